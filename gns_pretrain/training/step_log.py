"""Numbers of recent steps that wait on the device, so that it is read once an interval."""

import math
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.errors import TrainingError
from gns_pretrain.noise_scale.meter import Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.noise_scale.smoothing import Averages, include, smoothed
from gns_pretrain.parallel.collectives import mean_over_ranks
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import NoiseLine, TrainLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.training.state import TrainState

# A measurement of the noise scale, on its way into its averages and into the record.

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


class StepLog:
    """Collects steps and hands them to the record with one synchronisation an interval."""

    def __init__(self, record: Record, world: World) -> None:
        self._record = record
        self._world = world
        self._counters: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens_at_last_flush: int | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the steps' time what was done since the last flush."""
        self._since = time.perf_counter()

    def add(
        self,
        state: TrainState,
        *,
        loss: Tensor,
        gradient_norm: Tensor,
        lr: float,
        accumulation: int,
        step_tokens: int,
    ) -> None:
        """Note one step, counted in `state` already.

        Args:
            state: after the step.
            loss: 0-dim, this rank's mean, nats per token.
            gradient_norm: 0-dim, over all ranks.
            lr: learning rate of the step.
            accumulation: micro-batches of a rank.
            step_tokens: tokens of all ranks in the step.
        """
        self._losses.append(loss)
        self._norms.append(gradient_norm)
        self._counters.append(
            {
                "step": state.step,
                "samples": state.samples,
                "tokens": state.tokens,
                "lr": lr,
                "batch_size": state.batch_size,
                "micro_batch_size": state.micro_batch_size,
                "accumulation": accumulation,
            }
        )
        if self._tokens_at_last_flush is None:
            self._tokens_at_last_flush = state.tokens - step_tokens

    def flush(self) -> None:
        """Read the pending steps from the device and record them; all ranks together.

        Raises:
            TrainingError: a loss or a gradient norm is not finite; steps before it are recorded.
        """
        if not self._counters:
            return
        losses = mean_over_ranks(torch.stack(self._losses), self._world)
        values = torch.stack([losses, torch.stack(self._norms).to(losses)]).tolist()
        seconds = time.perf_counter() - self._since
        tokens = self._counters[-1]["tokens"] - self._tokens_at_last_flush
        for counters, loss, norm in zip(self._counters, *values, strict=True):
            raise_unless_finite(counters["step"], "loss", loss)
            raise_unless_finite(counters["step"], "gradient norm", norm)
            line = TrainLine(
                **counters,
                loss=loss,
                grad_norm=norm,
                step_seconds=seconds / len(self._counters),
                tokens_per_second=tokens / seconds,
            )
            self._record.write(line)
        self._tokens_at_last_flush = self._counters[-1]["tokens"]
        for pending in (self._counters, self._losses, self._norms):
            pending.clear()
        self.restart_clock()


def raise_unless_finite(step: int, name: str, value: float) -> None:
    """Stop a run one of whose losses, or whose gradient, has left the finite numbers."""
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {name} is {value}, not finite; the run stops and saves nothing of "
            "this step: lower optimizer.lr or look at the data, and start again under another "
            "run_name",
            on_all_ranks=True,
        )
