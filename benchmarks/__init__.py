"""How fast a step, a measurement, the data and a start are, and what a step should cost."""
