"""One measurement: noise N, signal M and their ratio, by geometry and by estimate.

`plug_in` is the paper's estimate, unchanged (arXiv:2602.03001, Eq. 22); the others stand beside it.

    geometry   estimate      noise N                     signal M
    euclidean  plug_in       sum_i sigma_i^2             ||g||_2^2
    euclidean  debiased      sum_i sigma_i^2             ||g||_2^2 - N / B
    euclidean  cross_fitted  sum_i sigma_i^2             s |s|
    manhattan  plug_in       (sum_i sigma_i)^2           ||g||_1^2
    manhattan  debiased      (sum_i sigma_i)^2 / c4^2    ||g||_1^2
    manhattan  cross_fitted  (sum_i sigma_i)^2           s |s|
    nuclear    plug_in       (sum_l tr C_l^(1/2))^2      (sum_l ||G_l||_S1)^2
    nuclear    cross_fitted  (sum_l tr C_l^(1/2))^2      s |s|

What each mends. E||g||_2^2 = ||true gradient||_2^2 + tr C / B: the Euclidean signal is read too
high, by all of it where noise rules. E[root of a variance over R samples] = c4(R) * sigma: the
Manhattan noise is read too low. No such factor is known for tr C^(1/2), so Nuclear has no debiased
estimate. The cross-fitted s (`cross_fitted.py`) stands for the dual norm in all three geometries,
and its noise is the plug-in one.

A single M of `debiased` or `cross_fitted` may be negative. It is kept that way: s |s| gives s back,
and only averages are clamped (`smoothing.py`).
"""

import math
from dataclasses import dataclass

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.estimators import small_sample_factor

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
