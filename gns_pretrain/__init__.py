"""Pretrain Llama 3 and let the measured gradient noise scale choose the batch size."""
