"""Ranks: how they meet, how the model is parallelized over them, and what they exchange."""
