"""Equations of the noise scale, one function each (arXiv:2602.03001).

    noise and signal from samples         Section 4.1, Eqs. 17, 20, 21
    signal from two independent halves    ours, after Lemma 3.1
    batch size from a noise scale         Eqs. 7 and 19, Appendix B
    Muon's critical batch                 arXiv:2507.01598

Legend: R samples (`num_samples`, micro-batches over all ranks, at least 2) of equal size; B
sequences per optimizer step over all ranks (`batch_size`); g^j the mean gradient of sample j, g
their mean, both before clipping; g_A and g_B (`first`, `second`) the mean gradients of the even and
of the odd samples; [m, n] a weight's shape, s = min(m, n).

A *total* adds up over coordinates, layers, shards and ranks, so each owner of a part computes its
own and one all-reduce ends it; `geometries.py` turns totals into noise and signal. Totals are
float64 and stay on the gradients' device. Pure functions: no collectives, no configuration.

The cross-fitted signal is what a step of half the batch would gain,

    s = (<g_A, p(g_B)> + <g_B, p(g_A)>) / 2

with p the geometry's steepest-descent direction. g_A has the true gradient as its mean and is
independent of g_B, so E[s] = E<true gradient, p(gradient of half a batch)>, the left side of Lemma
3.1 at half the batch, for sign, matrix sign and g / ||g|| alike. It is not an estimate of the dual
norm, which it nears as the batch grows. A single s can be negative where noise dominates; averages
must keep its sign, or they are biased up.

The same of smaller parts of the step, an eighth and a quarter of its samples, gives a curve: what
a step of n sequences would gain, P(n) = E<true gradient, p(gradient of n)>. Each part's direction
meets the mean gradient of all other samples, of which it is independent:

    s_A = <g_rest, p(g_A)>        E[s_A] = P(size of A)

Where noise dominates P grows as sqrt(n), where it does not P is constant, and between them we take
the curve that the Euclidean geometry has exactly, with two numbers to be fitted:

    P(n) = a sqrt(n / (n + b))        a: the dual norm; b: the bend, sequences

The best expected gain of one step, relative to that of a step without noise (Eq. 18), is

    Euclidean                1 / (1 + noise scale / B)
    Manhattan and Nuclear    (1 - sqrt(noise scale / B))^2 for B > noise scale

The second is a lower bound, first convex and then concave in B, so it has an inflection and a batch
size of largest gain per sequence; the first has neither. Batch sizes are in sequences, not rounded.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.directions import RANK_CUT, matrix_sign_product
from gns_pretrain.geometry.norms import norms
from gns_pretrain.geometry.square_root import iterated_traces

# A coordinate below this share of its other half counts as zero: it is the rounding of S and D,
# which are sums of R float32 terms. At u = 6e-8 these are off by u sqrt(R / 2) of themselves where
# noise rules and by less than R u where the terms agree: the cut serves 9,000 samples in the one
# case, 66 in the other. Of true coordinates it takes 5 in a million, of either sign: no bias, and
# an error of s that falls with the root of their number.
ROUNDING_CUT = 4e-6


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
        mean_gram: [..., s, s]; Grams of the smaller side, averaged over samples.
        gram_of_mean: same shape; the same Gram of the mean gradient. float64 for both where C is
            much smaller than they are: the difference keeps their rounding.

    Returns:
        Same shape; positive semi-definite up to rounding.
    """
    check_num_samples(num_samples)
    return (mean_gram - gram_of_mean) * (batch_size / (num_samples - 1))


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


def absolute_sums(values: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """sum_i |x_i|; 0-dimensional, float64.

    Args:
        values: [any], float32 or float64.
        sizes: of k segments, one after the other in flat `values`; each has a sum then, [k].
    """
    if sizes is None:
        return norms([values], 1.0)[0].double()
    return norms(values.split(list(sizes)), 1.0).double()


def signed_sums(values: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """sum_i x_i, like `absolute_sums`: torch has norms of many tensors at a time, but no sums."""
    return absolute_sums(values.clamp_min(0.0), sizes) - absolute_sums(values.clamp_max(0.0), sizes)


def euclidean_signal_total(mean: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """||g||_2^2, the denominator of Eq. 6; as `absolute_sums`."""
    return absolute_sums(mean.square(), sizes)


def euclidean_noise(
    sample_squares: float, mean_squares: float, *, batch_size: int, num_samples: int
) -> float:
    """sum_i sigma_i^2 by Eq. 20, of sums over coordinates; clamped at 0.

    Args:
        sample_squares: sum_j ||g^j||_2^2.
        mean_squares: ||g||_2^2.
    """
    spread = max(sample_squares / num_samples - mean_squares, 0.0)
    return spread * batch_size / (num_samples - 1)


def momentum_noise(momentum: float, *, nesterov: bool = False) -> float:
    """Noise of a momentum, relative to that of the one gradient that it is fed: a variance.

        m = beta m + g                    sum_k w_k^2 / (sum_k w_k)^2 = (1 - beta) / (1 + beta)
        g + beta m (Nesterov)             (1 - beta)^2 ((1 + beta)^2 + beta^4 / (1 - beta^2))

    with w_k the weight of the gradient of k steps ago. Sums and averages have the same. The true
    gradient is taken to stay over the momentum's half-life, and the run to be longer than that.

    Args:
        momentum: beta, in [0, 1).
        nesterov: whether a step looks ahead along the momentum.
    """
    if nesterov:
        of_past = momentum**4 / (1.0 - momentum**2)
        return (1.0 - momentum) ** 2 * ((1.0 + momentum) ** 2 + of_past)
    return (1.0 - momentum) / (1.0 + momentum)


def manhattan_noise_total(variance: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """||sigma||_1 = sum_i sigma_i, whose square is the numerator of Eq. 13; as `absolute_sums`."""
    return absolute_sums(variance.sqrt(), sizes)


def manhattan_signal_total(mean: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """||g||_1, whose square is the denominator of Eq. 13; as `absolute_sums`."""
    return absolute_sums(mean, sizes)


def nuclear_totals(
    mean_gram: Tensor, gram_of_mean: Tensor, *, batch_size: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """tr C^(1/2) and ||G||_S1 of each matrix of a stack; summed over layers, then squared, Eq. 17.

    ||G||_S1 = tr (G G^T)^(1/2), and C needs that Gram anyway: both square roots are one batch.

    Args:
        mean_gram: [k, s, s], float64; Grams of the smaller side, averaged over samples.
        gram_of_mean: [k, s, s]; the same Gram of the mean gradients.

    Returns:
        Noise and signal, [2, k], float64, by iteration; and [2, k], bool: whether it proved them.
    """
    covariance = gram_covariance(
        mean_gram, gram_of_mean, batch_size=batch_size, num_samples=num_samples
    )
    values, proven = iterated_traces(torch.cat([covariance, gram_of_mean]))
    return values.view(2, -1), proven.view(2, -1)


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
        num_even, num_odd: n_A and n_B, at least 1.
    """
    assert num_even > 0, "half A is empty"
    assert num_odd > 0, "half B is empty"
    first = (sample_sum + signed_sum) / (2 * num_even)
    second = (sample_sum - signed_sum) / (2 * num_odd)
    return (
        torch.where(first.abs() < ROUNDING_CUT * second.abs(), 0.0, first),
        torch.where(second.abs() < ROUNDING_CUT * first.abs(), 0.0, second),
    )


def euclidean_cross_totals(
    first: Tensor, second: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """<g_A, g_B>, ||g_A||^2 and ||g_B||^2, to be added over shards; [3] or [k, 3], float64.

    Args:
        sizes: of k segments, as in `absolute_sums`.
    """
    product = signed_sums(first * second, sizes)
    squares = (absolute_sums(half.square(), sizes) for half in (first, second))
    return torch.stack([product, *squares], dim=-1)


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


def manhattan_cross_total(
    first: Tensor, second: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """s for p(g) = sign(g), which adds up over shards; as `absolute_sums`."""
    return signed_sums(first * second.sign() + second * first.sign(), sizes) / 2


def nuclear_cross_total(
    first_gram: Tensor, second_gram: Tensor, product: Tensor, *, rank_cut: float = RANK_CUT
) -> Tensor:
    """s for p(G) = matrix sign of G, which adds up over matrices; 0-dimensional, float64.

        s = 1/2 sum_i u_i^T K u_i / b_i + 1/2 sum_i v_i^T K v_i / a_i,    K = G_A G_B^T

    with b_i and u_i singular values and left singular vectors of G_B, a_i and v_i those of G_A. A
    half of few tokens has fewer singular values than the matrix is wide. The cut leaves the others
    out; without it rounding alone gives them directions, and s is off by tens of per cent.

    Args:
        first_gram, second_gram, product: [..., s, s], float64; G_A G_A^T, G_B G_B^T and K, or for
            tall matrices G_A^T G_A, G_B^T G_B and G_A^T G_B: `cross_grams`.
        rank_cut: singular values below this share of the largest count as zero.
    """
    grams = (first_gram, second_gram)
    gains = [matrix_sign_product(product, gram, rank_cut=rank_cut) for gram in grams]
    return (gains[0] + gains[1]) / 2


def cross_grams(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `nuclear_cross_total` takes of two halves [..., m, n]; float64."""
    first, second = first.double(), second.double()
    if first.shape[-2] > first.shape[-1]:
        first, second = first.mT, second.mT
    return first @ first.mT, second @ second.mT, first @ second.mT


def part_means(
    sample_sum: Tensor, part_sum: Tensor, *, num_part: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Mean gradients g_A of a part of the samples and g_rest of all others.

    Args:
        sample_sum: the sum of the R sample gradients; any shape.
        part_sum: that of the part, summed by itself, so that what no sample of it has is zero.
        num_part: samples of the part, at least 1 and below R.
        num_samples: R.
    """
    return part_sum / num_part, (sample_sum - part_sum) / (num_samples - num_part)


def euclidean_part_totals(part: Tensor, rest: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """<g_rest, g_A> and ||g_A||^2, to be added over shards; [2] or [k, 2], float64."""
    product, square = signed_sums(part * rest, sizes), absolute_sums(part.square(), sizes)
    return torch.stack([product, square], dim=-1)


def manhattan_part_total(part: Tensor, rest: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """s_A for p(g) = sign(g), which adds up over shards; as `absolute_sums`."""
    return signed_sums(rest * part.sign(), sizes)


def nuclear_part_total(part_gram: Tensor, product: Tensor, *, rank_cut: float = RANK_CUT) -> Tensor:
    """s_A for p(G) = matrix sign of G, which adds up over matrices; 0-dimensional, float64.

    Args:
        part_gram, product: [..., s, s], float64; G_A G_A^T and G_A G_rest^T: `part_grams`.
        rank_cut: as in `nuclear_cross_total`.
    """
    return matrix_sign_product(product, part_gram, rank_cut=rank_cut)


def part_grams(part: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """What `nuclear_part_total` takes of a part and the rest, [..., m, n]; float64."""
    gram, _, product = cross_grams(part, rest)
    return gram, product


def progress_curve(sizes: Sequence[float], gains: Sequence[float]) -> tuple[float, float]:
    """Fit P(n) = a sqrt(n / (n + b)) to gains of steps of several sizes, by least squares.

    For each b the best a is linear; b is sought on a grid of 5 % from a thousandth of the smallest
    size to a thousand times the largest, whose ends stand for a curve without a bend.

    Args:
        sizes: n, sequences, positive.
        gains: means of s at these sizes, in the geometry's unit.

    Returns:
        a, not below 0, and b in sequences; b is inf where the gains rise as sqrt(n) or faster, or
        have no positive mean, and 0 where they do not rise.
    """
    largest = max(sizes)
    bends, shapes, squares = _curves(tuple(n / largest for n in sizes))
    s = np.asarray(gains)
    heights = (shapes @ s / squares).clip(min=0.0)
    best = np.square(s - heights[:, None] * shapes).sum(1).argmin()
    a = float(heights[best])
    if a == 0.0 or best == len(bends) - 1:
        return a, math.inf
    return a, float(bends[best]) * largest if best else 0.0


@lru_cache
def _curves(sizes: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The grid of bends; sqrt(n / (n + b)) of each, [bends, sizes]; and its squares' sums."""
    low, high = min(sizes) / 1000.0, max(sizes) * 1000.0
    bends = np.geomspace(low, high, 1 + math.ceil(math.log(high / low) / math.log(1.05)))
    shapes = np.sqrt(np.asarray(sizes) / (np.asarray(sizes) + bends[:, None]))
    return bends, shapes, np.square(shapes).sum(1)


def share_given_up(batch_size: float, bend: float) -> float:
    """Progress that one step of 2 B gives up against two steps of B, as a share of the latter.

        1 - sqrt(2) P(2 B) / (2 P(B)) = 1 - sqrt((B + b) / (2 B + b))

    The one step has sqrt(2) times the learning rate: its second-order cost, which grows with the
    square, is then that of the two. 0 where noise dominates, 1 - 1 / sqrt(2) = 0.29 where it does
    not.

    Args:
        batch_size: B, sequences.
        bend: b, sequences, of `progress_curve`; may be inf.
    """
    return 1.0 - math.sqrt(1.0 - batch_size / (2.0 * batch_size + bend))


def noise_scale(noise: float, signal: float) -> float | None:
    """N / M in sequences (Eq. 22); None where the signal is not positive: no decision follows."""
    return noise / signal if signal > 0.0 else None


def target_batch_size(noise: float, signal: float, *, theta: float) -> float | None:
    """B = N / (theta^2 M) (Eq. 7); None where the signal is not positive: no decision.

    In the Manhattan and Nuclear geometries it reaches (1 - theta)^2 of the largest gain.

    Args:
        noise, signal: N and M, of one sequence.
        theta: tolerated noise-to-signal ratio of the gradient, positive; the paper's is 0.6, and
            0.3 for the Euclidean one of its Table 9. Algorithm 1 has it below 1; an estimate that
            reads the noise scale higher than the plug-in one does may need more.

    Raises:
        InputError: theta is not positive.
    """
    if not theta > 0.0:
        raise InputError(f"batch_size.theta={theta} must be positive; the paper uses 0.6")
    # Divided twice: the square of a tiny theta is 0.
    return noise / signal / theta / theta if signal > 0.0 else None


def euclidean_fraction_batch(noise_scale: float, *, kappa: float) -> float:
    """The batch size with a fraction kappa in (0, 1) of the largest gain, Euclidean (Eq. 19)."""
    return kappa / (1.0 - kappa) * noise_scale


def dual_norm_fraction_batch(noise_scale: float, *, kappa: float) -> float:
    """The same for Manhattan and Nuclear (Eqs. 19, 39); kappa = (1 - theta)^2 gives Eq. 7."""
    return noise_scale / (1.0 - math.sqrt(kappa)) ** 2


def inflection_batch(noise_scale: float) -> float:
    """Where the gain of one more sequence starts to fall, Manhattan and Nuclear (Eq. 43, revised).

    d^2/dB^2 (1 - sqrt(b / B))^2 = -3/2 sqrt(b) B^(-5/2) + 2 b B^(-3) = 0 at B = 16/9 b
    """
    return 16.0 / 9.0 * noise_scale


def inflection_v1_batch(noise_scale: float) -> float:
    """The inflection as the paper's first version prints it, Manhattan and Nuclear (Eq. 43 of v1).

    It is the root of v1's Eq. 42, whose last term has 4 where differentiating Eq. 41 gives 2; at
    64/9 the gain reaches 39 % of its largest value, and past the bend at 16/9 it is concave.
    """
    return 64.0 / 9.0 * noise_scale


def maximum_efficiency_batch(noise_scale: float) -> float:
    """The largest gain per sequence, Manhattan and Nuclear (Eq. 45): theta = 1/2, kappa = 1/4."""
    return 4.0 * noise_scale


def euclidean_goodput_batch(noise_scale: float, *, overhead: float) -> float:
    """The largest gain per second, where a step takes overhead + B times a sequence's (Eq. 18).

        d/dB B / ((B + b) (overhead + B)) = 0    at    B^2 = overhead b

    Args:
        overhead: the fixed seconds of a step over those of one more sequence; inf if that is free.
    """
    return math.sqrt(overhead * noise_scale) if noise_scale > 0.0 else 0.0


def dual_norm_goodput_batch(noise_scale: float, *, overhead: float) -> float:
    """The same for Manhattan and Nuclear: `maximum_efficiency_batch` without an overhead (Eq. 18).

        d/dB (1 - (b / B)^(1/2))^2 / (overhead + B) = 0
        at    x^3 - 2 s x^2 - s overhead = 0    with x = B^(1/2), s = b^(1/2)

    whose one positive root is Cardano's, x = 2/3 s + u^(1/3) + (k^2 / u)^(1/3).
    """
    if not noise_scale > 0.0:
        return 0.0
    root = math.sqrt(noise_scale)
    k = 8.0 / 27.0 * root**3
    h = k + root * overhead / 2.0
    u = h + math.sqrt(h - k) * math.sqrt(h + k)
    return (2.0 / 3.0 * root + math.cbrt(u) + math.cbrt(k) ** 2 / math.cbrt(u)) ** 2


def muon_critical_batch(noise: float, *, precision: float, momentum: float) -> float:
    """A lower bound of the batch with which Muon needs the fewest sequences (arXiv:2507.01598).

        X / T + Y / b^(1/2) + Z <= eps after T steps
        T b is least at b* = (3 Y / (2 (eps - Z)))^2 > 9 Y^2 / (4 eps^2)          (Proposition 4.2)

    The meter measures none of X, Z and eps: X and Z have the smoothness and the lowest loss, eps is
    the gradient norm at which training may end. That paper claims how b* moves with momentum and
    weight decay, not how large it is. Of Y it measures the noise; in place of the paper's variance
    and effective rank ours is

        Y = 2 ((1 - beta) / (1 + beta) N)^(1/2)

    twice what bounds the expected nuclear norm of the noise in a momentum average. Weight decay,
    which is in the paper's Y, and Nesterov's step (+ 19 % at beta = 0.95) are left out.

    Args:
        noise: N of the nuclear geometry, of one sequence.
        precision: eps, as a nuclear norm. With that of the gradient as it is, M^(1/2), the bound is
            9 (1 - beta) / (1 + beta) noise scales: 0.23 of them at beta = 0.95, 9 without momentum.
        momentum: beta, in [0, 1).
    """
    return 9.0 * (1.0 - momentum) / (1.0 + momentum) * noise / precision**2
