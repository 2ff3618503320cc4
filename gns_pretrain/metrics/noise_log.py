"""A measurement of the noise scale, on its way into its averages and into the record."""

import statistics
from dataclasses import asdict
from typing import Any

from gns_pretrain.distributed.noise_meter import Reading
from gns_pretrain.metrics.lines import NoiseLine
from gns_pretrain.metrics.record import Record
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.noise_scale.smoothing import Averages, include, smoothed
from gns_pretrain.state import TrainState

SPREAD_OVER = 10  # measurements


def note_noise(
    record: Record, state: TrainState, reading: Reading, *, settings: NoiseScaleSettings
) -> None:
    """Add a reading to its averages and record both; one that is not finite changes nothing."""
    total = reading.total
    if total.skip_reason is not None:
        record.message(
            f"step {state.step:,}: the measurement is left out of the averages: {total.skip_reason}"
        )
        return
    key = f"{total.geometry}/{total.estimate}"
    averages = include(Averages(**state.averages.get(key, {})), total, settings.smoothing)
    state.averages[key] = asdict(averages)
    ema = smoothed(averages, total.estimate, settings.smoothing)
    more: dict[str, Any] = {"spread": spread_of_last(state, key, total.noise_scale)}
    more |= fallbacks_of(reading) | parts_of(reading)
    line = NoiseLine(
        step=state.step,
        geometry=total.geometry,
        estimate=total.estimate,
        noise=total.noise,
        signal=total.signal,
        noise_scale=total.noise_scale,
        noise_ema=ema.noise,
        signal_ema=ema.signal,
        noise_scale_ema=ema.noise_scale,
        num_samples=total.num_samples,
        seconds=reading.seconds,
        more=more,
    )
    record.write(line)


def spread_of_last(state: TrainState, key: str, noise_scale: float | None) -> float | None:
    """Standard deviation of the last single noise scales, in sequences; None below two of them.

    It stands in for an interval, which would need every sample's gradient.
    """
    recent = state.recent_noise_scales.setdefault(key, [])
    if noise_scale is not None:
        recent.append(noise_scale)
        del recent[:-SPREAD_OVER]
    return statistics.stdev(recent) if len(recent) > 1 else None


def fallbacks_of(reading: Reading) -> dict[str, int]:
    """How many square roots took the slow route, which a run on a GPU should not pay unawares."""
    return {"square_root_fallbacks": reading.num_fallbacks} if reading.num_fallbacks else {}


def parts_of(reading: Reading) -> dict[str, Any]:
    """Noise and signal of each part of the model; nothing where no parts were asked for."""
    parts = {
        name: {"noise": part.noise, "signal": part.signal} for name, part in reading.parts.items()
    }
    return {"parts": parts} if parts else {}
