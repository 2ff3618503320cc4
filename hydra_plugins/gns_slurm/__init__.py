"""Hydra finds its plugins here by the name of the folder above."""
