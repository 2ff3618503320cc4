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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.directions import RANK_CUT, matrix_sign, sign_direction
from gns_pretrain.geometry.square_root import trace_square_root

# The signal from two independent halves of a step: what a step of half the batch would gain.
#
#     s = (<g_A, p(g_B)> + <g_B, p(g_A)>) / 2
#
# with p the geometry's steepest-descent direction. g_A has the true gradient as its mean and knows
# nothing of g_B, so E[s] = E<true gradient, p(gradient of half a batch)>, the left side of Lemma
# 3.1 of arXiv:2602.03001 at half the batch, for sign, matrix sign and g / ||g|| alike. It is not an
# estimate of the dual norm, which it nears as the batch grows. A single s can be negative where
# noise rules; averages of s must keep its sign, or they are biased up.
#
# Legend: R samples, even ones in half A and odd ones in half B; g_A, g_B their mean gradients.

# A coordinate below this share of its other half counts as zero: it is the rounding of S and D,
# which are sums of R float32 terms. At u = 6e-8 these are off by u sqrt(R / 2) of themselves where
# noise rules and by less than R u where the terms agree: the cut serves 9,000 samples in the one
# case, 66 in the other. Of true coordinates it takes 5 in a million, of either sign: no bias, and
# an error of s that falls with the root of their number.
ROUNDING_CUT = 4e-6


def half_means(
    sample_sum: Tensor, signed_sum: Tensor, *, num_even: int, num_odd: int
) -> tuple[Tensor, Tensor]:
    """Mean gradients of the even and the odd samples.

        g_A = (S + D) / (2 n_A)    g_B = (S - D) / (2 n_B)

    Where one half has no gradient, as in the embedding of a token that it lacks, S and D differ by
    rounding alone. A sign would make a full step of it, so it is set to the zero that it stands
    for: see `ROUNDING_CUT`. On 3 ranks uncut signs were off by up to 28 %.

    Args:
        sample_sum: S, the sum of the R sample gradients; any shape.
        signed_sum: D, the same with +1 for even and -1 for odd sample indices.
        num_even: n_A, at least 1.
        num_odd: n_B, at least 1.

    Returns:
        g_A and g_B, each of that shape.
    """
    assert num_even > 0, "half A is empty"
    assert num_odd > 0, "half B is empty"
    first = (sample_sum + signed_sum) / (2 * num_even)
    second = (sample_sum - signed_sum) / (2 * num_odd)
    return without_rounding(first, of=second), without_rounding(second, of=first)


def without_rounding(half: Tensor, *, of: Tensor) -> Tensor:
    """One half's mean gradient, 0 where it is no more than the rounding of the other's."""
    return torch.where(half.abs() < ROUNDING_CUT * of.abs(), 0.0, half)


def euclidean_cross_totals(first: Tensor, second: Tensor) -> Tensor:
    """<g_A, g_B>, ||g_A||^2 and ||g_B||^2; [3], float64, added over shards before the next step.

    Args:
        first: g_A, any shape.
        second: g_B, same shape.
    """
    products = (first * second, first.square(), second.square())
    return torch.stack([product.sum(dtype=torch.float64) for product in products])


def euclidean_cross_signal(cross_totals: Tensor) -> Tensor:
    """s for p(g) = g / ||g||_2 over all coordinates together; 0-dimensional.

        s = <g_A, g_B> / 2 * (1 / ||g_A|| + 1 / ||g_B||)

    Args:
        cross_totals: [3], from `euclidean_cross_totals`, added over all shards. A half without any
            gradient has no direction and adds nothing.
    """
    product, squares = cross_totals[0], cross_totals[1:]
    inverse_norms = torch.where(squares > 0, squares, torch.inf).rsqrt()
    return product / 2 * inverse_norms.sum()


def manhattan_cross_total(first: Tensor, second: Tensor) -> Tensor:
    """s for p(g) = sign(g), which adds up over shards; 0-dimensional, float64.

    Args:
        first: g_A, any shape.
        second: g_B, same shape.
    """
    gains = first * sign_direction(second) + second * sign_direction(first)
    return gains.sum(dtype=torch.float64) / 2


def nuclear_cross_totals(first: Tensor, second: Tensor, *, rank_cut: float = RANK_CUT) -> Tensor:
    """s for p(G) = matrix sign of G, which adds up over matrices; [k], float64.

    A half of few tokens has fewer singular values than the matrix is wide. The cut leaves the
    others out; without it rounding alone gives them directions, and s is off by tens of per cent.

    Args:
        first: [k, m, n]; G_A of k matrices.
        second: same shape; G_B.
        rank_cut: singular values below this share of the largest count as zero.
    """
    first, second = first.double(), second.double()
    gains = first * matrix_sign(second, rank_cut=rank_cut)
    gains += second * matrix_sign(first, rank_cut=rank_cut)
    return gains.sum((-2, -1)) / 2


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


# One measurement: noise N, signal M and their ratio, by geometry and by estimate.
#
# `plug_in` is the paper's estimate, unchanged (arXiv:2602.03001, Eq. 22); the others stand beside
# it.
#
#     geometry   estimate      noise N                     signal M
#     euclidean  plug_in       sum_i sigma_i^2             ||g||_2^2
#     euclidean  debiased      sum_i sigma_i^2             ||g||_2^2 - N / B
#     euclidean  cross_fitted  sum_i sigma_i^2             s |s|
#     manhattan  plug_in       (sum_i sigma_i)^2           ||g||_1^2
#     manhattan  debiased      (sum_i sigma_i)^2 / c4^2    ||g||_1^2
#     manhattan  cross_fitted  (sum_i sigma_i)^2           s |s|
#     nuclear    plug_in       (sum_l tr C_l^(1/2))^2      (sum_l ||G_l||_S1)^2
#     nuclear    cross_fitted  (sum_l tr C_l^(1/2))^2      s |s|
#
# What each mends. E||g||_2^2 = ||true gradient||_2^2 + tr C / B: the Euclidean signal is read too
# high, by all of it where noise rules. E[root of a variance over R samples] = c4(R) * sigma: the
# Manhattan noise is read too low. No such factor is known for tr C^(1/2), so Nuclear has no
# debiased estimate. The cross-fitted s (`cross_fitted.py`) stands for the dual norm in all three
# geometries, and its noise is the plug-in one.
#
# A single M of `debiased` or `cross_fitted` may be negative. It is kept that way: s |s| gives s
# back, and only averages are clamped (`smoothing.py`).

# The estimates that each geometry has; the paper's first.
ESTIMATES = {
    "euclidean": ("plug_in", "debiased", "cross_fitted"),
    "manhattan": ("plug_in", "debiased", "cross_fitted"),
    "nuclear": ("plug_in", "cross_fitted"),
}


@dataclass(frozen=True)
class Measurement:
    """Noise and signal of one optimizer step, for one geometry and estimate.

    Args:
        geometry: a key of `ESTIMATES`.
        estimate: one of its estimates.
        noise: N, of one sequence.
        signal: M; negative if a debiased or cross-fitted one came out so.
        num_samples: R.
        batch_size: B, sequences per optimizer step over all ranks.
    """

    geometry: str
    estimate: str
    noise: float
    signal: float
    num_samples: int
    batch_size: int

    @property
    def noise_scale(self) -> float | None:
        """N / M in sequences (Eq. 22); None where the signal is not positive."""
        return noise_scale(self.noise, self.signal)

    @property
    def skip_reason(self) -> str | None:
        """Why this measurement must not enter an average; None if it may."""
        for name, value in (("noise", self.noise), ("signal", self.signal)):
            if not math.isfinite(value):
                return f"{self.geometry} {name} is {value}"
        return None


def measure(
    geometry: str,
    estimate: str,
    *,
    noise_total: float,
    signal_total: float,
    batch_size: int,
    num_samples: int,
) -> Measurement:
    """N and M from totals over all layers and shards, by the table above.

    Args:
        geometry: "euclidean", "manhattan" or "nuclear".
        estimate: "plug_in", "debiased" or "cross_fitted".
        noise_total: sum_i sigma_i^2, sum_i sigma_i or sum_l tr C_l^(1/2).
        signal_total: ||g||_2^2, ||g||_1 or sum_l ||G_l||_S1; for "cross_fitted" s.
        batch_size: B, sequences per optimizer step over all ranks.
        num_samples: R, at least 2.

    Raises:
        InputError: a geometry without that estimate.
    """
    check_estimate(geometry, estimate)
    euclidean = geometry == "euclidean"
    noise = noise_total if euclidean else noise_total**2
    if estimate == "cross_fitted":
        signal = signal_total * abs(signal_total)
    else:
        signal = signal_total if euclidean else signal_total**2
    if estimate == "debiased" and euclidean:
        signal -= noise / batch_size
    elif estimate == "debiased":
        noise /= small_sample_factor(num_samples) ** 2
    return Measurement(geometry, estimate, noise, signal, num_samples, batch_size)


def noise_scale(noise: float, signal: float) -> float | None:
    """N / M in sequences (Eq. 22); None where the signal is not positive: no decision follows."""
    return noise / signal if signal > 0.0 else None


def check_estimate(geometry: str, estimate: str) -> None:
    """Raise InputError unless the geometry is known and has this estimate."""
    if geometry not in ESTIMATES:
        raise InputError(
            f"noise_scale.geometries holds {geometry}, which is unknown; use {', '.join(ESTIMATES)}"
        )
    if estimate not in ESTIMATES[geometry]:
        raise InputError(
            f"noise_scale.estimates holds {estimate}, which geometry {geometry} does not have; "
            f"use one of {', '.join(ESTIMATES[geometry])}"
        )
