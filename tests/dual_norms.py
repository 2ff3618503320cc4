"""Dual norms of a gradient, the reference: what a unit step gains (arXiv:2602.03001, 2.1).

    step measured in      gradient measured in (dual)
    Euclidean, l2         l2
    maximum, l_inf        Manhattan, l1
    spectral, S_inf       nuclear, S1: the sum of the singular values

A gradient is one tensor or a list of tensors, one for each parameter. Sums run in float64, so that
a list split over ranks adds up to the same number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Gradient = Tensor | Sequence[Tensor]


def euclidean(gradient: Gradient) -> Tensor:
    """||g||_2 over all coordinates of all tensors; 0-dimensional, float64."""
    return _total([tensor.double().square().sum() for tensor in _tensors(gradient)]).sqrt()


def manhattan(gradient: Gradient) -> Tensor:
    """||g||_1 over all coordinates of all tensors; 0-dimensional, float64."""
    return _total([tensor.abs().sum(dtype=torch.float64) for tensor in _tensors(gradient)])


def nuclear(gradient: Gradient) -> Tensor:
    """Sum of ||G||_S1 over matrices, by singular values in float64: the reference.

    Args:
        gradient: [..., m, n], or a list of such; every matrix counts by itself.

    Returns:
        0-dimensional, float64. `square_root.trace_square_root` of a Gram is the fast one.
    """
    return _total([torch.linalg.svdvals(matrix.double()).sum() for matrix in _tensors(gradient)])


def _tensors(gradient: Gradient) -> Sequence[Tensor]:
    return [gradient] if isinstance(gradient, Tensor) else gradient


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()
