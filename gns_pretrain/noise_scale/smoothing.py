"""Noise and signal averaged over measurements, each by itself (arXiv:2602.03001, Eq. 23).

    N_k = beta N_(k-1) + (1 - beta) N    M_k likewise, then the ratio of the two

Averages start at zero, as in the equation. Dividing by the weight given so far, 1 - beta^k, makes
the first average the first measurement; with one beta for both the ratio is the same either way.

What is averaged is linear in the data, and only the average is clamped: for a cross-fitted estimate
s with its sign, so that M = max(average of s, 0)^2, and for the others M, so that
M = max(average of M, 0). The progress curve of `nested` is fitted to means over a window.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from gns_pretrain.fields import Settings, within
from gns_pretrain.noise_scale.equations import noise_scale, share_given_up
from gns_pretrain.noise_scale.geometries import GAINS, Measurement, nested_noise_and_signal

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


@dataclass(frozen=True)
class SmoothedProgress(SmoothedNoiseScale):
    """What the progress curve through the last measurements says; its bend is the noise scale."""

    batch_size: float  # sequences of the measured steps, on average
    bends_without_one: tuple[float, ...]  # bends where one of the measurements is left out

    def share_given_up(self, batch_size: float) -> tuple[float, float]:
        """Return `equations.share_given_up` and its standard error, by the jackknife."""
        bend = math.inf if self.noise_scale is None else self.noise_scale
        shares = [share_given_up(batch_size, each) for each in self.bends_without_one]
        count, mean = len(shares), statistics.fmean(shares)
        variance = (count - 1) / count * sum((share - mean) ** 2 for share in shares)
        return share_given_up(batch_size, bend), math.sqrt(variance)


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


class ProgressTracker(NoiseTracker):
    """Follows `nested` measurements: the progress curve through the means of the last of them.

    Gains may be averaged, and the sizes of the parts with them; fits may not. `_recent` has batch
    size, sizes and gains of each measurement in a row, as checkpoints hold it.
    """

    def __init__(self, geometry: str, estimate: str, settings: SmoothingSettings) -> None:
        super().__init__(geometry, estimate, settings)
        self._curve: SmoothedProgress | None = None

    def include(self, measurement: Measurement) -> None:
        """Take a measurement in place of the oldest one."""
        kind = (measurement.geometry, measurement.estimate)
        if kind != (self.geometry, self.estimate) or measurement.skip_reason is not None:
            return
        row = [measurement.batch_size, *measurement.sizes, *measurement.gains]
        self._recent = [*self._recent, *row][-len(row) * SPREAD_OVER :]
        self._fit()

    @property
    def smoothed(self) -> SmoothedProgress | None:
        """What the curve says; None before the first measurement."""
        return self._curve

    @property
    def spread(self) -> float | None:
        """None: a single measurement's bend may be infinite."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        if self._recent:
            self._fit()

    def _fit(self) -> None:
        width = 1 + 2 * len(GAINS)
        rows = [self._recent[i : i + width] for i in range(0, len(self._recent), width)]
        noise, signal = curve_through(rows)
        left_out = range(len(rows)) if len(rows) > 1 else ()
        others = [curve_through(rows[:i] + rows[i + 1 :]) for i in left_out]
        self._curve = SmoothedProgress(
            noise,
            signal,
            noise_scale(noise, signal),
            batch_size=statistics.fmean(row[0] for row in rows),
            bends_without_one=tuple(n / m if m else math.inf for n, m in others),
        )


def curve_through(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """N and M of the mean of some of a `ProgressTracker`'s rows."""
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    sizes, gains = means[1 : 1 + len(GAINS)], means[1 + len(GAINS) :]
    return nested_noise_and_signal(sizes, gains)


def tracker_of(geometry: str, estimate: str, settings: SmoothingSettings) -> NoiseTracker:
    """Return what follows a geometry and estimate, before its first measurement."""
    kind = ProgressTracker if estimate == "nested" else NoiseTracker
    return kind(geometry, estimate, settings)
