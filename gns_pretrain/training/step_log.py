"""What steps leave for the record: their numbers wait on the device, read once an interval."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.errors import TrainingError
from gns_pretrain.noise_scale.meter import Reading
from gns_pretrain.noise_scale.smoothing import NoiseTracker
from gns_pretrain.parallel.collectives import mean_over_ranks
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import NoiseLine, TrainLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.training.state import TrainState
from gns_pretrain.training.step import StepResult


def record_noise(
    record: Record, step: int, readings: Iterable[Reading], averages: Mapping[str, NoiseTracker]
) -> None:
    """Write a line for each reading and the averages that it has entered.

    Args:
        record: of the run.
        step: that was measured.
        readings: of the step.
        averages: `BatchSizer.averages` after the step.
    """
    for reading in readings:
        total = reading.total
        if total.skip_reason is not None:
            record.message(
                f"step {step:,}: the measurement is left out of the averages: {total.skip_reason}"
            )
            continue
        tracker = averages[f"{total.geometry}/{total.estimate}"]
        smoothed = tracker.smoothed
        assert smoothed is not None
        more: dict[str, Any] = {"spread": tracker.spread} | reading.details
        if reading.parts:
            more["parts"] = {
                name: {"noise": part.noise, "signal": part.signal}
                for name, part in reading.parts.items()
            }
        line = NoiseLine(
            step=step,
            geometry=total.geometry,
            estimate=total.estimate,
            noise=total.noise,
            signal=total.signal,
            noise_scale=total.noise_scale,
            noise_ema=smoothed.noise,
            signal_ema=smoothed.signal,
            noise_scale_ema=smoothed.noise_scale,
            num_samples=total.num_samples,
            seconds=reading.seconds,
            more=more,
        )
        record.write(line)


class StepLog:
    """Collects steps and writes them to the record with one synchronisation an interval."""

    def __init__(self, record: Record, world: World) -> None:
        self._record = record
        self._world = world
        self._counters: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens_at_last_flush: int | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude what was done since the last flush from the steps' time."""
        self._since = time.perf_counter()

    def add(self, state: TrainState, result: StepResult, *, lr: float, tokens_before: int) -> None:
        """Keep one step, counted in `state` already, for the next flush.

        Args:
            state: after the step.
            result: of the step.
            lr: learning rate of the step.
            tokens_before: tokens of the run before the step.
        """
        self._losses.append(result.loss)
        self._norms.append(result.gradient_norm)
        self._counters.append(
            {
                "step": state.step,
                "samples": state.samples,
                "tokens": state.tokens,
                "lr": lr,
                "batch_size": state.batch_size,
                "micro_batch_size": state.micro_batch_size,
                "accumulation": state.accumulation,
            }
        )
        if self._tokens_at_last_flush is None:
            self._tokens_at_last_flush = tokens_before

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
    """Stop a run whose loss or gradient is not finite.

    Raises:
        TrainingError: with a hint.
    """
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {name} is {value}, not finite; the run stops and saves nothing of "
            "this step: lower optimizer.lr or look at the data, and start again under another "
            "run_name",
            on_all_ranks=True,
        )
