"""Hydra's launchers for a sweep, on this machine and on SLURM; Hydra looks for plugins here."""
