"""Noise and signal averaged over measurements, each by itself (arXiv:2602.03001, Eq. 23).

    N_k = beta N_(k-1) + (1 - beta) N    M_k likewise, then the ratio of the two

Averages start at zero, as in the equation. Dividing by the weight given so far, 1 - beta^k, makes
the first average the first measurement; with one beta for both the ratio is the same either way.

What is averaged is linear in the data, and only the average is clamped: for a cross-fitted estimate
s with its sign, so that M = max(average of s, 0)^2, and for the others M, so that
M = max(average of M, 0).
"""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from gns_pretrain.fields import Settings, within
from gns_pretrain.noise_scale.equations import noise_scale
from gns_pretrain.noise_scale.geometries import Measurement

SPREAD_OVER = 10  # measurements

Decay = Annotated[float, within(0, 1, hint="0 keeps only the last measurement, the paper uses 0.9")]


@dataclass
class SmoothingSettings(Settings):
    """How much of an average survives a measurement."""

    section: ClassVar[str] = "noise_scale.smoothing"

    noise_decay: Decay = 0.9  # beta^N, the paper's
    signal_decay: Decay = 0.9  # beta^M, the paper's
    bias_corrected: bool = True  # ours: divide by the weight given so far


@dataclass(frozen=True)
class Averages:
    """Averages of one geometry and estimate, before any bias correction."""

    noise: float = 0.0  # of N
    signal: float = 0.0  # of M, or of the signed s of a cross-fitted estimate
    noise_weight: float = 0.0  # 1 - beta^k after k measurements; 0 before the first
    signal_weight: float = 0.0  # the same for the signal


@dataclass(frozen=True)
class SmoothedNoiseScale:
    """What the averages say now."""

    noise: float  # N_k, of one sequence
    signal: float  # M_k, clamped at 0
    noise_scale: float | None  # their ratio in sequences; None while the signal is not positive


def include(averages: Averages, measurement: Measurement, settings: SmoothingSettings) -> Averages:
    """Return the averages after one more measurement (Eq. 23)."""
    beta_noise, beta_signal = settings.noise_decay, settings.signal_decay
    signal = measurement.signal
    if measurement.estimate == "cross_fitted":  # the mean of s is unbiased, that of s |s| is not
        signal = math.copysign(math.sqrt(abs(signal)), signal)
    return Averages(
        noise=beta_noise * averages.noise + (1.0 - beta_noise) * measurement.noise,
        signal=beta_signal * averages.signal + (1.0 - beta_signal) * signal,
        noise_weight=beta_noise * averages.noise_weight + (1.0 - beta_noise),
        signal_weight=beta_signal * averages.signal_weight + (1.0 - beta_signal),
    )


def smoothed(averages: Averages, estimate: str, settings: SmoothingSettings) -> SmoothedNoiseScale:
    """Return noise, signal and noise scale by the averages; zeros before any measurement."""
    noise, signal = averages.noise, averages.signal
    if settings.bias_corrected and averages.noise_weight > 0.0:
        noise, signal = noise / averages.noise_weight, signal / averages.signal_weight
    signal = max(signal, 0.0)
    if estimate == "cross_fitted":
        signal = signal**2
    return SmoothedNoiseScale(noise, signal, noise_scale(noise, signal))


class NoiseTracker:
    """Follows one geometry and estimate: its averages, and how far its single scales spread."""

    def __init__(self, geometry: str, estimate: str, settings: SmoothingSettings) -> None:
        self.geometry = geometry
        self.estimate = estimate
        self.settings = settings
        self._averages = Averages()
        self._recent: list[float] = []  # noise scales of single measurements, newest last

    def include(self, measurement: Measurement) -> None:
        """Average a measurement; one of another kind or not finite (`skip_reason`) is left out."""
        kind = (measurement.geometry, measurement.estimate)
        if kind != (self.geometry, self.estimate) or measurement.skip_reason is not None:
            return
        self._averages = include(self._averages, measurement, self.settings)
        if measurement.noise_scale is not None:
            self._recent = [*self._recent, measurement.noise_scale][-SPREAD_OVER:]

    @property
    def smoothed(self) -> SmoothedNoiseScale | None:
        """What the averages say; None before the first measurement."""
        if self._averages.noise_weight == 0.0:
            return None
        return smoothed(self._averages, self.estimate, self.settings)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the last single noise scales, in sequences; None below two.

        It stands in for an interval, which would need every sample's gradient.
        """
        return statistics.stdev(self._recent) if len(self._recent) > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """Averages and recent noise scales."""
        return {"averages": asdict(self._averages), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._averages = Averages(**state["averages"])
        self._recent = list(state["recent"])
