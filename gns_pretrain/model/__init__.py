"""Llama 3 as a plain nn.Module, its loss, and the way to and from transformers' format."""
