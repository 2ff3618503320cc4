"""Batch sizes that a noise scale suggests (arXiv:2602.03001, Eqs. 7 and 19, Appendix B).

The best expected gain of one step, relative to that of a step without noise (Eq. 18):

    Euclidean                1 / (1 + noise scale / B)
    Manhattan and Nuclear    (1 - sqrt(noise scale / B))^2 for B > noise scale

The second is a lower bound, first convex and then concave in B, so it has an inflection and a batch
size of largest gain per sequence; the first has neither. Batch sizes are in sequences, not rounded.
"""

import math

from gns_pretrain.errors import InputError

# Below this theta the plug-in target exceeds B where there is no true gradient at all, so that a
# batch can grow from noise alone: the square root of what the noise scale then reads, over B.
#   Euclidean  E||g||_2^2 = tr C / B, so that it reads B
#   Manhattan  E|g_i| = (2 / pi)^(1/2) sigma_i B^(-1/2), so that it reads (pi / 2) B (many samples)
#   Nuclear    between the two, by shape: E||g||_S1 of a square matrix of independent entries is
#              8 / (3 pi) of tr C^(1/2) B^(-1/2), that of a very wide one all of it
NOISE_ALONE_THETA = {
    "euclidean": 1.0,
    "manhattan": math.sqrt(math.pi / 2.0),
    "nuclear": 3.0 * math.pi / 8.0,
}


def target_batch_size(noise: float, signal: float, *, theta: float) -> float | None:
    """B = N / (theta^2 M) (Eq. 7); None where the signal is not positive: no decision.

    In the Manhattan and Nuclear geometries it reaches (1 - theta)^2 of the largest gain.

    Args:
        noise: N, of one sequence.
        signal: M.
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
    """The inflection as the paper prints it, Manhattan and Nuclear (Eq. 43).

    It is the root of Eq. 42, whose last term has 4 where differentiating Eq. 41 gives 2; the gain
    really bends at `corrected_inflection_batch`, and at 64/9 it reaches 39 % of its largest value.
    """
    return 64.0 / 9.0 * noise_scale


def corrected_inflection_batch(noise_scale: float) -> float:
    """Where the gain of one more sequence starts to fall, Manhattan and Nuclear.

    d^2/dB^2 (1 - sqrt(b / B))^2 = -3/2 sqrt(b) B^(-5/2) + 2 b B^(-3) = 0 at B = 16/9 b
    """
    return 16.0 / 9.0 * noise_scale


def maximum_efficiency_batch(noise_scale: float) -> float:
    """The largest gain per sequence, Manhattan and Nuclear (Eq. 45): theta = 1/2, kappa = 1/4."""
    return 4.0 * noise_scale
