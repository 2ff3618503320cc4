"""What steps leave for the record: their numbers wait on the device, read once an interval."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gns_pretrain.batch_size import AdaptiveBatchSize
from gns_pretrain.errors import DivergedError
from gns_pretrain.noise_scale.geometries import GAINS
from gns_pretrain.noise_scale.meter import Reading
from gns_pretrain.noise_scale.smoothing import NoiseTracker
from gns_pretrain.parallel.collectives import from_main, sum_over_ranks
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import READ_AT, NoiseLine, TrainLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.unit import Unit
from gns_pretrain.training.step import StepResult


def record_noise(
    record: Record, step: int, readings: Iterable[Reading], averages: Mapping[str, NoiseTracker]
) -> None:
    """Write a line for each reading and the averages (after it) that it has entered.

    `step` is the one that ends: that which was measured, or a later one.
    """
    for reading in readings:
        total = reading.total
        if total.skip_reason is not None:
            record.message(
                f"step {reading.step:,}: the measurement is left out of the averages: "
                f"{total.skip_reason}"
            )
            continue
        tracker = averages[f"{total.geometry}/{total.estimate}"]
        smoothed = tracker.smoothed
        assert smoothed is not None
        more: dict[str, Any] = {"spread": tracker.spread} | reading.details
        more |= dict(zip(GAINS, total.gains, strict=False))
        if reading.parts:
            more["parts"] = {
                name: {"noise": part.noise, "signal": part.signal}
                for name, part in reading.parts.items()
            }
        if step != reading.step:
            more[READ_AT] = step
        line = NoiseLine(
            step=reading.step,
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
    """Collects steps and writes them to the record with one synchronisation an interval.

    Args:
        record: takes the lines.
        world: of training.
        adaptive: takes the seconds of each step where it weighs them.
        unit: in which the run counts its way.
        peak_speed: of all ranks, in that unit a second, at which their GPUs do nothing but
            matmuls; None leaves out how near a step comes to it.
    """

    def __init__(
        self,
        record: Record,
        world: World,
        adaptive: AdaptiveBatchSize,
        unit: Unit,
        *,
        peak_speed: float | None = None,
    ) -> None:
        self._record = record
        self._world = world
        self._adaptive = adaptive
        self._unit = unit
        self._peak_speed = peak_speed
        self._pending: list[tuple[dict[str, Any], StepResult]] = []  # each step's counters, result
        self._samples_at_last_flush: int | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude what was done since the last flush from the steps' time."""
        self._since = time.perf_counter()

    def add(self, result: StepResult, *, lr: float, samples_before: int) -> None:
        """Keep one step, counted already, but not in `samples_before`, for the next flush."""
        adaptive = self._adaptive
        counters = {
            "step": adaptive.steps,
            "samples": adaptive.samples,
            self._unit.name: self._unit.of(adaptive.samples),
            "batch_size": adaptive.batch_size,
            "micro_batch_size": adaptive.micro_batch_size,
            "accumulation": adaptive.accumulation,
            "lr": lr,
        }
        self._pending.append((counters, result))
        if self._samples_at_last_flush is None:
            self._samples_at_last_flush = samples_before

    def flush(self) -> None:
        """Record the pending steps, on all ranks; DivergedError at the first that is not finite."""
        if not self._pending:
            return
        steps, results = zip(*self._pending, strict=True)
        total_losses = sum_over_ranks(torch.stack([r.loss for r in results]), self._world)
        norms = torch.stack([r.gradient_norm for r in results]).to(total_losses)
        values = torch.stack([total_losses / self._world.num_ranks, norms]).tolist()
        seconds = time.perf_counter() - self._since
        if self._adaptive.weighs_seconds:  # the recorded ones, so that a replay has what it had
            seconds = from_main(seconds, self._world)
            for counters in steps:
                self._adaptive.include_seconds(counters["batch_size"], seconds / len(steps))
        count = self._unit.of(steps[-1]["samples"] - self._samples_at_last_flush)
        on_gpu: dict[str, float] = {}
        if self._world.device.type == "cuda":
            on_gpu["peak_memory_gib"] = round(peak_memory(self._world.device) / 2**30, 2)
        if self._peak_speed:
            on_gpu["mfu"] = count / seconds / self._peak_speed
        speed: dict[str, Any] = {self._unit.speed: count / seconds}
        for counters, result, loss, norm in zip(steps, results, *values, strict=True):
            if result.skipped is None:
                raise_unless_finite(counters["step"], "loss", loss)
                raise_unless_finite(counters["step"], "gradient norm", norm)
            line = TrainLine(
                **counters,
                loss=loss,
                grad_norm=norm,
                step_seconds=seconds / len(steps),
                **speed,
                more=on_gpu | ({} if result.skipped is None else {"skipped": result.skipped}),
            )
            self._record.write(line)
        self._samples_at_last_flush = steps[-1]["samples"]
        self._pending.clear()
        self.restart_clock()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this rank has taken so far, of a GPU or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def raise_unless_finite(step: int, name: str, value: float) -> None:
    """Raise DivergedError, which stops the run, for a loss or gradient that is not finite."""
    if not math.isfinite(value):
        raise DivergedError(
            f"step {step}: the {name} is {value}, not finite; the run stops and saves nothing of "
            "this step: start the same command with bad_steps.skip=true",
            on_all_ranks=True,
        )
