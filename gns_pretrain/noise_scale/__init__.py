"""Gradient noise scales in three geometries (arXiv:2602.03001): pure functions of samples."""
