"""Noise and signal of a gradient from samples of it (arXiv:2602.03001, Section 4.1).

Legend: R samples (micro-batches, over all ranks) of equal size; B sequences per optimizer step; g^j
the mean gradient of sample j, g their mean, both before clipping; [m, n] a weight's shape.

A *total* is a number that adds up over coordinates, layers, shards and ranks, so that each owner of
a part computes its own and one all-reduce ends it. `measurement.measure` turns totals into N and M:
Euclidean totals are N and M themselves, Manhattan and Nuclear ones are summed first, then squared.

Pure functions: no collectives, no configuration, no logging. Totals are float64 and stay where the
gradients are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import trace_square_root


def coordinate_variance(
    mean_square: Tensor, mean: Tensor, *, batch_size: int, num_samples: int
) -> Tensor:
    """Variance of each coordinate of one sequence's gradient (Eq. 20).

        sigma_i^2 = B / (R - 1) * (mean_j (g_i^j)^2 - g_i^2)

    R / (R - 1) removes the bias of a variance over R samples; B / R turns the variance of one
    sample's mean gradient into that of one sequence.

    Args:
        mean_square: [any], float32; squares of the sample gradients, averaged over samples.
        mean: same shape; the mean gradient.
        batch_size: B, sequences per optimizer step over all ranks.
        num_samples: R, at least 2.

    Returns:
        Same shape; clamped at 0, because rounding can leave a small negative.
    """
    check_num_samples(num_samples)
    return (mean_square - mean.square()).clamp_min(0.0) * (batch_size / (num_samples - 1))


def gram_covariance(
    mean_gram: Tensor, gram_of_mean: Tensor, *, batch_size: int, num_samples: int
) -> Tensor:
    """Row covariance of one sequence's gradient matrix, or the column one if m > n (Eq. 21).

        C = B / (R - 1) * (mean_j G^j G^j^T - G G^T)

    The factors are those of Eq. 20, whose sum over a row is a diagonal entry of C.

    Args:
        mean_gram: [..., s, s], s = min(m, n); Grams of the smaller side, averaged over samples.
        gram_of_mean: same shape; the same Gram of the mean gradient. float64 for both where C is
            much smaller than they are: the difference keeps their rounding.
        batch_size: B, sequences per optimizer step over all ranks.
        num_samples: R, at least 2.

    Returns:
        Same shape; positive semi-definite up to rounding.
    """
    check_num_samples(num_samples)
    return (mean_gram - gram_of_mean) * (batch_size / (num_samples - 1))


def euclidean_noise_total(variance: Tensor) -> Tensor:
    """tr C = sum_i sigma_i^2, the numerator of Eq. 6; 0-dimensional.

    Args:
        variance: [any]; from `coordinate_variance`.
    """
    return variance.sum(dtype=torch.float64)


def euclidean_signal_total(mean: Tensor) -> Tensor:
    """||g||_2^2, the denominator of Eq. 6; 0-dimensional.

    Args:
        mean: [any]; the mean gradient.
    """
    return mean.square().sum(dtype=torch.float64)


def manhattan_noise_total(variance: Tensor) -> Tensor:
    """||sigma||_1 = sum_i sigma_i, whose square is the numerator of Eq. 13; 0-dimensional.

    Args:
        variance: [any]; from `coordinate_variance`.
    """
    return variance.sqrt().sum(dtype=torch.float64)


def manhattan_signal_total(mean: Tensor) -> Tensor:
    """||g||_1, whose square is the denominator of Eq. 13; 0-dimensional.

    Args:
        mean: [any]; the mean gradient.
    """
    return mean.abs().sum(dtype=torch.float64)


class NuclearTotals(NamedTuple):
    """Noise and signal of k matrices; summed over all layers, then squared, Eq. 17.

    Args:
        noise: [k], float64; tr C^(1/2) of each matrix.
        signal: [k], float64; ||G||_S1 of each matrix.
        num_fallbacks: of the 2k square roots, those that the iteration could not vouch for.
    """

    noise: Tensor
    signal: Tensor
    num_fallbacks: int


def nuclear_totals(
    mean_gram: Tensor,
    gram_of_mean: Tensor,
    *,
    batch_size: int,
    num_samples: int,
    mode: str = "auto",
) -> NuclearTotals:
    """tr C^(1/2) and ||G||_S1 of each matrix of a stack (Eq. 17).

    ||G||_S1 = tr (G G^T)^(1/2), and C needs that Gram anyway: both square roots are one batch.

    Args:
        mean_gram: [k, s, s], s = min(m, n), float64; Grams of the smaller side, averaged over
            samples.
        gram_of_mean: [k, s, s]; the same Gram of the mean gradients.
        batch_size: B, sequences per optimizer step over all ranks.
        num_samples: R, at least 2.
        mode: of the square roots, see `trace_square_root`.
    """
    covariance = gram_covariance(
        mean_gram, gram_of_mean, batch_size=batch_size, num_samples=num_samples
    )
    roots = trace_square_root(torch.cat([covariance, gram_of_mean]), mode=mode)
    noise, signal = roots.values.split(len(mean_gram))
    return NuclearTotals(noise, signal, roots.num_fallbacks)


def small_sample_factor(num_samples: int) -> float:
    """c4(R): the mean of a standard deviation over R normal samples, relative to the true one.

        c4(R) = sqrt(2 / (R - 1)) * Gamma(R / 2) / Gamma((R - 1) / 2)

    The variance is unbiased, its root is not: 0.80 at R = 2, 0.97 at R = 8, 0.99 at R = 32.
    """
    check_num_samples(num_samples)
    log_ratio = math.lgamma(num_samples / 2) - math.lgamma((num_samples - 1) / 2)
    return math.sqrt(2.0 / (num_samples - 1)) * math.exp(log_ratio)


def check_num_samples(num_samples: int) -> None:
    """Raise InputError unless there are two samples to compare."""
    if num_samples < 2:
        raise InputError(
            f"num_samples={num_samples}: a noise scale compares at least 2 micro-batches of one "
            "step; use more ranks, a smaller micro_batch_size or a larger batch_size.initial"
        )
