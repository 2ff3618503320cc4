"""Where the time of a training step goes, by phase and by operator, with a Chrome trace.

A phase is a range of `torch.profiler.record_function`, opened by `training/step.py`, by the
gradient tap and here. Ranges nest, on the thread that runs the backward pass too; a moment belongs
to the innermost range that contains it, whichever thread opened it. What a GPU does belongs to the
phase in which the host launched it.
"""

import gzip
import json
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
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
from gns_pretrain.fields import About, at_least, one_of
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings

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
        About("Chrome trace to write, .json or .json.gz, for chrome://tracing or ui.perfetto.dev"),
    ] = None

    def run(self) -> Iterator[Row]:
        """Yield one row; seconds are of one step, and the profiler slows small steps down."""
        world = this_process()
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self.workload(world, self.optimizer) as work, tempfile.TemporaryDirectory() as folder:
            meter = None
            if self.geometry is not None:
                meter = NoiseMeter(work.run.model, world, NoiseScaleSettings([self.geometry]))
            for _ in range(WARM_UP_STEPS):
                named_step(work, meter)
            with profile(activities=activities) as profiler:
                for _ in range(self.steps):
                    named_step(work, meter)
            path = self.trace or Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = read_trace(path)
        timeline = Timeline(events)
        yield {
            "measured": "profile",
            **self.described(self.optimizer),
            "geometry": self.geometry,
            "steps": self.steps,
            **({"trace": str(self.trace)} if self.trace else {}),
            **step_totals(events, timeline, self.steps),
            "phases": phase_rows(events, timeline, self.steps),
            "operators": operator_rows(
                profiler.key_averages(), self.steps, self.operators, world.device
            ),
        }


def named_step(work: Workload, meter: NoiseMeter | None) -> None:
    """Take one step with the ranges that the package does not open itself."""
    with record_function(STEP):
        work.step(meter, named_batches(work))
        with record_function(WAITING):
            synchronize(work.run.world)


def named_batches(work: Workload) -> Iterator[Tensor]:
    """Yield a step's micro-batches; fetching each one is a range."""
    with record_function("data"):
        remaining = work.micro_batches()
    while True:
        with record_function("data"):
            batch = next(remaining, None)
        if batch is None:
            return
        yield batch


def read_trace(path: Path) -> list[Event]:
    """Return the events of a Chrome trace that have a duration."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[Event] = json.loads(text)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


class Timeline:
    """The phase of each moment: `other` within a step but outside its phases, None outside steps.

    Args:
        events: of a Chrome trace; ranges of other names are ignored.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        spans = sorted(
            (event["ts"], -event["dur"], event["name"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in (STEP, *PHASES)
        )
        self.starts: list[float] = []
        self.names: list[str | None] = []
        open_spans: list[tuple[float, str]] = []  # end and name, the innermost last

        def close_until(time: float) -> None:
            while open_spans and open_spans[-1][0] <= time:
                end, _ = open_spans.pop()
                self._enter(end, open_spans[-1][1] if open_spans else None)

        for start, negative, name in spans:
            close_until(start)
            open_spans.append((start - negative, name))
            self._enter(start, name)
        close_until(float("inf"))

    def _enter(self, time: float, name: str | None) -> None:
        self.starts.append(time)
        self.names.append(OTHER if name == STEP else name)

    def phase_at(self, time: float) -> str | None:
        """Return the phase at a time."""
        index = bisect_right(self.starts, time) - 1
        return self.names[index] if index >= 0 else None

    def seconds(self) -> Counter[str]:
        """Return host seconds by phase; they add up to those of the steps."""
        total: Counter[str] = Counter()
        for name, start, end in zip(self.names, self.starts, self.starts[1:], strict=False):
            if name is not None:
                total[name] += (end - start) / 1e6  # type: ignore[assignment]
        return total


def device_seconds(events: Sequence[Event], timeline: Timeline) -> Counter[str]:
    """Return seconds of kernels and copies by the phase that launched them."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ON_DEVICE:
            time = launched.get(event["args"].get("correlation"))
            phase = timeline.phase_at(time) if time is not None else None
            total[phase or OTHER] += event["dur"] / 1e6
    return total


def synchronisations(events: Iterable[Event], timeline: Timeline) -> Counter[str]:
    """Count by phase how often the host waited for the device, without a step's last wait."""
    waits: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in LAUNCHES and event["name"] in SYNCHRONISATIONS:
            phase = timeline.phase_at(event["ts"])
            if phase not in (None, WAITING):
                waits[str(phase)] += 1
    return waits


def step_totals(events: Sequence[Event], timeline: Timeline, steps: int) -> Row:
    """Return host seconds of a step, and on a GPU its share of busy time and its waits."""
    seconds = sum(timeline.seconds().values()) / steps
    busy = sum(device_seconds(events, timeline).values()) / steps
    row: Row = {"seconds": round(seconds, 6)}
    if busy:
        row["device_busy_percent"] = round(100 * busy / seconds, 1)
        waits = synchronisations(events, timeline).total() / steps
        row["host_synchronisations_a_step"] = round(waits, 2)
    return row


def phase_rows(events: Sequence[Event], timeline: Timeline, steps: int) -> list[Row]:
    """Return each phase's seconds on the host; on a GPU also those of what it launched there."""
    host, device = timeline.seconds(), device_seconds(events, timeline)
    waits = synchronisations(events, timeline)
    all_host, all_device = sum(host.values()), sum(device.values())
    rows = []
    for phase in (*PHASES, OTHER):
        if not (host[phase] or device[phase]):
            continue
        row: Row = {
            "phase": phase,
            "seconds": round(host[phase] / steps, 6),
            "percent": round(100 * host[phase] / all_host, 1),
        }
        if all_device:
            row["device_seconds"] = round(device[phase] / steps, 6)
            row["device_percent"] = round(100 * device[phase] / all_device, 1)
            row["host_synchronisations"] = round(waits[phase] / steps, 2)
        rows.append(row)
    return rows


def operator_rows(averages: Any, steps: int, count: int, device: torch.device) -> list[Row]:
    """Return the costliest kernels of a GPU, or operators of a CPU, by their own time."""
    on_gpu = device.type == "cuda"
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for entry in averages:
        if entry.key in (STEP, *PHASES) or getattr(entry, "is_user_annotation", False):
            continue
        if on_gpu == (entry.device_type == torch.autograd.DeviceType.CUDA):
            own[entry.key] += entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
            calls[entry.key] += entry.count
    total = own.total() or 1
    return [
        {
            "operator": name,
            "calls": round(calls[name] / steps, 1),
            "seconds": round(microseconds / 1e6 / steps, 6),
            "percent": round(100 * microseconds / total, 1),
        }
        for name, microseconds in own.most_common(count)
    ]
