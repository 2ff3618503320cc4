"""Noise and signal averaged over measurements, each by itself (arXiv:2602.03001, Eq. 23).

    N_k = beta N_(k-1) + (1 - beta) N    M_k likewise, then the ratio of the two

Averages start at zero, as in the equation. Dividing by the weight given so far, 1 - beta^k, makes
the first average the first measurement; with one beta for both the ratio is the same either way.

What is averaged is linear in the data, and only the average is clamped: for a cross-fitted estimate
s with its sign, so that M = max(average of s, 0)^2, and for the others M, so that
M = max(average of M, 0).
"""

import math
from dataclasses import dataclass

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import Measurement, noise_scale


@dataclass
class SmoothingSettings:
    """How much of an average survives a measurement."""

    noise_decay: float = 0.9  # beta^N, the paper's
    signal_decay: float = 0.9  # beta^M, the paper's
    bias_corrected: bool = True  # ours: divide by the weight given so far

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        for name in ("noise_decay", "signal_decay"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise InputError(
                    f"noise_scale.smoothing.{name}={value} must be at least 0 and below 1; "
                    "0 keeps only the last measurement, the paper uses 0.9"
                )


@dataclass(frozen=True)
class Averages:
    """Averages of one geometry and estimate; `asdict` saves, `Averages(**values)` loads.

    Args:
        noise: average of N, before any bias correction.
        signal: average of M, or of the signed s of a cross-fitted estimate.
        noise_weight: 1 - beta^k after k measurements; 0 before the first.
        signal_weight: the same for the signal.
    """

    noise: float = 0.0
    signal: float = 0.0
    noise_weight: float = 0.0
    signal_weight: float = 0.0


@dataclass(frozen=True)
class SmoothedNoiseScale:
    """What the averages say now.

    Args:
        noise: N_k, of one sequence.
        signal: M_k, clamped at 0.
        noise_scale: their ratio in sequences; None while the signal is not positive.
    """

    noise: float
    signal: float
    noise_scale: float | None


def include(averages: Averages, measurement: Measurement, settings: SmoothingSettings) -> Averages:
    """Averages after one more measurement; the same ones if it is not finite (`skip_reason`)."""
    if measurement.skip_reason is not None:
        return averages
    beta_noise, beta_signal = settings.noise_decay, settings.signal_decay
    signal = _linear(measurement.signal, measurement.estimate)
    return Averages(
        noise=beta_noise * averages.noise + (1.0 - beta_noise) * measurement.noise,
        signal=beta_signal * averages.signal + (1.0 - beta_signal) * signal,
        noise_weight=beta_noise * averages.noise_weight + (1.0 - beta_noise),
        signal_weight=beta_signal * averages.signal_weight + (1.0 - beta_signal),
    )


def smoothed(averages: Averages, estimate: str, settings: SmoothingSettings) -> SmoothedNoiseScale:
    """Noise, signal and noise scale that the averages stand for; zeros before any measurement."""
    noise, signal = averages.noise, averages.signal
    if settings.bias_corrected and averages.noise_weight > 0.0:
        noise, signal = noise / averages.noise_weight, signal / averages.signal_weight
    signal = max(signal, 0.0)
    if estimate == "cross_fitted":
        signal = signal**2
    return SmoothedNoiseScale(noise, signal, noise_scale(noise, signal))


def _linear(signal: float, estimate: str) -> float:
    """The quantity whose mean is unbiased: s of M = s |s| for a cross-fitted estimate, else M."""
    return math.copysign(math.sqrt(abs(signal)), signal) if estimate == "cross_fitted" else signal
