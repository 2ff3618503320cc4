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
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
        yield {
            "measured": "profile",
            **self.described(self.optimizer),
            **self.options("geometry", "steps"),
            **({"trace": str(self.trace)} if self.trace else {}),
            **Timeline(events).rows(self.steps),
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
    """Which phase each moment belongs to, and each phase's share of what happened.

    Args:
        events: of a Chrome trace; ranges of other names are ignored.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._name_stretches(events)
        self.host: dict[str, float] = defaultdict(
            float
        )  # microseconds; they add up to those of the steps
        for name, start, end in zip(self.names, self.starts, self.starts[1:], strict=False):
            if name is not None:
                self.host[name] += end - start
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

    def _name_stretches(self, events: Sequence[Event]) -> None:
        """Cut time into stretches and name each by the innermost range; ranges nest."""
        spans = sorted(
            (event["ts"], -event["dur"], event["name"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in (STEP, *PHASES)
        )
        self.starts: list[float] = []
        self.names: list[str | None] = []
        open_spans: list[tuple[float, str]] = []  # end and name, the innermost last
        for start, negative, name in [*spans, (math.inf, 0.0, OTHER)]:
            while open_spans and open_spans[-1][0] <= start:
                self.starts.append(open_spans.pop()[0])
                self.names.append(open_spans[-1][1] if open_spans else None)
            open_spans.append((start - negative, OTHER if name == STEP else name))
            self.starts.append(start)
            self.names.append(open_spans[-1][1])

    def phase_at(self, time: float) -> str | None:
        """Return the phase at a time: `other` in a step but outside its phases, None outside."""
        index = bisect_right(self.starts, time) - 1
        return self.names[index] if index >= 0 else None

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


def operator_rows(averages: Any, steps: int, count: int, device: torch.device) -> list[Row]:
    """Return the costliest kernels of a GPU, or operators of a CPU, by their own time."""
    on_gpu = device.type == "cuda"
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    entries = [
        entry
        for entry in averages
        if on_gpu == (entry.device_type == torch.autograd.DeviceType.CUDA)
        and not (entry.key in (STEP, *PHASES) or entry.is_user_annotation)
    ]
    entries.sort(key=lambda entry: getattr(entry, own), reverse=True)
    total = sum(getattr(entry, own) for entry in entries) or 1
    return [
        {
            "operator": entry.key,
            "calls": round(entry.count / steps, 1),
            "seconds": round(getattr(entry, own) / 1e6 / steps, 6),
            "percent": round(100 * getattr(entry, own) / total, 1),
        }
        for entry in entries[:count]
    ]
