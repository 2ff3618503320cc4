"""How fast a step, a measurement, the data and a start are, and what a step should cost."""

import gns_pretrain.commands  # noqa: F401  first: it says how threads wait, before torch is loaded
