"""Where the time of a training step goes, by phase and by operator, with a Chrome trace.

A phase is a range of `torch.profiler.record_function`, opened by `training/step.py`, by the
gradient tap and here. Ranges nest, on the thread that runs the backward pass too; a moment belongs
to the innermost range that contains it, whichever thread opened it. What a GPU does belongs to the
phase in which the host launched it.
"""

import gzip
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness import (
    OPTIMIZERS,
    WARM_UP_STEPS,
    Row,
    StepCommand,
    Workload,
    synchronize,
    this_process,
)
from gns_pretrain.fields import About, at_least, one_of, path_name
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.training.workload import MicroBatch

STEP = "step"
WAITING = "waiting"  # for the device, at the end of a step
PHASES = ("data", "forward", "backward", "measurement", "optimizer", WAITING)
OTHER = "other"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
# Calls after which the host has waited for the device.
SYNCHRONISATIONS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)

Event = dict[str, Any]  # of a Chrome trace; times in microseconds


@dataclass
class Profile(StepCommand):
    """Where a training step's time goes."""

    optimizer: Annotated[str, one_of(*OPTIMIZERS), About("update rule")] = "adamw"
    geometry: Annotated[
        str | None, one_of(*GEOMETRIES), About("measured in every step; default: none")
    ] = None
    steps: Annotated[int, at_least(1), About("profiled, after two that are not")] = 3
    operators: Annotated[int, at_least(0), About("how many of the costliest to name")] = 12
    trace: Annotated[
        Path | None,
        path_name(),
        About("Chrome trace to write, .json or .json.gz, for chrome://tracing or ui.perfetto.dev"),
    ] = None

    def run(self) -> Iterator[Row]:
        """Yield one row; seconds are of one step, and the profiler slows small steps down."""
        world = this_process()
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self.workload(world, self.optimizer) as work, tempfile.TemporaryDirectory() as folder:
            meter = work.meter(self.geometry) if self.geometry else None
            for _ in range(WARM_UP_STEPS):
                named_step(work, meter)
            with profile(activities=activities) as profiler:
                for _ in range(self.steps):
                    named_step(work, meter)
            path = self.trace or Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            with (gzip.open if path.suffix == ".gz" else open)(path) as file:
                events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
        yield {
            "measured": "profile",
            **self.described(self.optimizer),
            **self.options("geometry", "steps"),
            **({"trace": str(self.trace)} if self.trace else {}),
            **Timeline(events).rows(self.steps),
            "operators": self.operator_rows(profiler.key_averages(), world.device),
        }

    def operator_rows(self, averages: Any, device: torch.device) -> list[Row]:
        """Return the costliest kernels of a GPU, or operators of a CPU, by their own time."""
        on_gpu = device.type == "cuda"
        own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        entries = [
            (getattr(entry, own) / 1e6 / self.steps, entry.count / self.steps, entry.key)
            for entry in averages
            if on_gpu == (entry.device_type == torch.autograd.DeviceType.CUDA)
            and not (entry.key in (STEP, *PHASES) or entry.is_user_annotation)
        ]
        total = sum(seconds for seconds, _, _ in entries) or 1
        return [
            {
                "operator": name,
                "calls": round(calls, 1),
                "seconds": round(seconds, 6),
                "percent": round(100 * seconds / total, 1),
            }
            for seconds, calls, name in sorted(entries, reverse=True)[: self.operators]
        ]


def named_step(work: Workload, meter: NoiseMeter | None) -> None:
    """Take one step with the ranges that the package does not open itself."""
    with record_function(STEP):
        work.step(meter, named_batches(work))
        with record_function(WAITING):
            synchronize(work.run.world)


def named_batches(work: Workload) -> Iterator[MicroBatch]:
    """Yield a step's micro-batches; fetching each one is a range."""
    with record_function("data"):
        remaining = work.micro_batches()
    while True:
        with record_function("data"):
            batch = next(remaining, None)
        if batch is None:
            return
        yield batch


class Timeline:
    """Each phase's share of what happened, from the events of a Chrome trace."""

    def __init__(self, events: Sequence[Event]) -> None:
        # Start, negative duration and phase; of those that contain a moment, the innermost is last.
        self.spans = sorted(
            (event["ts"], -event["dur"], OTHER if event["name"] == STEP else event["name"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in (STEP, *PHASES)
        )
        # Microseconds; they add up to those of the steps.
        self.host: dict[str, float] = defaultdict(float)
        open_spans: list[tuple[float, str]] = []  # end and phase, the innermost last
        for start, negative, phase in self.spans:
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                self.host[open_spans[-1][1]] += negative
            self.host[phase] -= negative
            open_spans.append((start - negative, phase))
        runtime = [event for event in events if event.get("cat") in LAUNCHES]
        launched = {e["args"].get("correlation"): e["ts"] for e in runtime if "args" in e}
        self.device: dict[str, float] = defaultdict(float)  # microseconds of kernels and copies
        for event in events:
            if event.get("cat") in ON_DEVICE:
                time = launched.get(event["args"].get("correlation"), -math.inf)
                self.device[self.phase_at(time) or OTHER] += event["dur"]
        # How often the host waited for the device, without a step's last wait.
        waits = [self.phase_at(e["ts"]) for e in runtime if e["name"] in SYNCHRONISATIONS]
        self.waits = Counter(phase for phase in waits if phase not in (None, WAITING))

    def phase_at(self, time: float) -> str | None:
        """Return the phase at a time: `other` in a step but outside its phases, None outside."""
        spans = reversed(self.spans)
        return next((p for start, neg, p in spans if start <= time < start - neg), None)

    def rows(self, steps: int) -> Row:
        """Return a step's totals, and its phases as rows of their own.

        On a GPU each phase also has the seconds of what it launched there.
        """
        host, device = sum(self.host.values()), sum(self.device.values())
        row: Row = {"seconds": round(host / 1e6 / steps, 6), "phases": []}
        if device:
            row["device_busy_percent"] = round(100 * device / host, 1)
            row["host_synchronisations_a_step"] = round(self.waits.total() / steps, 2)
        for phase in (*PHASES, OTHER):
            if not (self.host[phase] or self.device[phase]):
                continue
            entry: Row = {
                "phase": phase,
                "seconds": round(self.host[phase] / 1e6 / steps, 6),
                "percent": round(100 * self.host[phase] / host, 1),
            }
            if device:
                entry["device_seconds"] = round(self.device[phase] / 1e6 / steps, 6)
                entry["device_percent"] = round(100 * self.device[phase] / device, 1)
                entry["host_synchronisations"] = round(self.waits[phase] / steps, 2)
            row["phases"].append(entry)
        return row
