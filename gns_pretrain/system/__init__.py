"""Files, processes and SLURM's environment; knows nothing of training."""
