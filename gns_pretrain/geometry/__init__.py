"""Norms, steepest-descent directions and the matrix functions they need: pure torch functions."""
