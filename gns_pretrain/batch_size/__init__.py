"""How many sequences an optimizer step takes: policies, the sizes that ranks can take, decisions.

Pure functions and small classes: no collectives, no configuration library, no logging. What has to
survive a checkpoint is handed in and out as plain numbers.
"""

from gns_pretrain.batch_size.feasible import accumulation_steps
from gns_pretrain.batch_size.settings import BatchSizeSettings

__all__ = ["BatchSizeSettings", "accumulation_steps"]
