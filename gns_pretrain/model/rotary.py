"""Rotary position embedding (arXiv:2104.09864) with Llama-3.1's frequency scaling.

Legend: T sequence length, d head width. Coordinate i of a head turns together with coordinate
i + d/2: transformers' layout, so exported weights need no permutation.
"""

import math

import torch
from torch import Tensor

from gns_pretrain.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per token of each pair of coordinates: theta^(-2i/d), scaled if asked.

    Scaled: with w = original_sequence_length * f / 2 pi, the turns that frequency f makes in the
    original context, and s = (w - low) / (high - low) clamped to [0, 1],

        f' = (1 - s) * f / factor + s * f

    Returns:
        [d / 2], float32, on the CPU whatever the default device: the last bit of a power differs
        between devices, and a far position multiplies it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
    scaling = config.rope_scaling
    if not scaling.enabled:
        return frequencies
    turns = scaling.original_sequence_length / (2 * math.pi / frequencies)
    band = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / band).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_tables(frequencies: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions 0 to T - 1, as `rotate` wants them.

    Args:
        frequencies: [d / 2], float32; from `inverse_frequencies`.
        length: T, tokens.
        device: where the tables are needed.

    Returns:
        Two tensors [T, 1, d], float32: (cos, cos) and (-sin, sin) side by side.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.to(device)).unsqueeze(1)  # [T, 1, d / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of coordinates of each head by its position's angle.

        y_i = x_i cos - x_(i+d/2) sin,    y_(i+d/2) = x_(i+d/2) cos + x_i sin

    Args:
        x: [B, T, H, d], any float dtype.
        cos: [T, 1, d]; see `rotary_tables`. In float32 the product is taken in float32.
        sin: [T, 1, d], signed.

    Returns:
        Same shape and dtype as x.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
