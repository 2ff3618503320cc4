"""Where the time of a training step goes, by phase and by operator, with a Chrome trace."""

import gzip
import json
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.workload import Training, Workload, training

# From a Chrome trace to seconds by phase of a training step: pure functions of its events.
#
# A phase is a range of `torch.profiler.record_function`. Ranges nest, on the thread that runs the
# backward pass too; a moment belongs to the innermost range that holds it, whichever thread opened
# it. What a GPU does belongs to the phase in which the host has launched it.

Event = dict[str, Any]

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


class Span(NamedTuple):
    """A range; times in microseconds."""

    name: str
    start: float
    end: float


class Timeline:
    """Which phase each moment belongs to.

    Args:
        events: of a Chrome trace; ranges of other names are not looked at.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        spans = [
            Span(event["name"], event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in (STEP, *PHASES)
        ]
        self.starts, self.names = innermost(spans)

    def phase_at(self, time: float) -> str | None:
        """The phase at a time; `other` within a step but outside its phases, None outside."""
        index = bisect_right(self.starts, time) - 1
        return self.names[index] if index >= 0 else None

    def seconds(self) -> Counter[str]:
        """Host seconds by phase; they add up to those of the steps."""
        total: Counter[str] = Counter()
        for name, start, end in zip(self.names, self.starts, self.starts[1:], strict=False):
            if name is not None:
                total[name] += (end - start) / 1e6  # type: ignore[assignment]
        return total


def innermost(spans: Sequence[Span]) -> tuple[list[float], list[str | None]]:
    """Cut time into stretches and name each by the range that was opened last.

    Returns:
        Starts of the stretches in order, and their names: None where no range is open.
    """
    starts: list[float] = []
    names: list[str | None] = []
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    waiting = sorted(spans, key=lambda span: (span.start, -span.end))
    open_spans: list[Span] = []
    position = 0
    for edge in edges:
        open_spans = [span for span in open_spans if span.end > edge]
        while position < len(waiting) and waiting[position].start <= edge:
            if waiting[position].end > edge:
                open_spans.append(waiting[position])
            position += 1
        name = open_spans[-1].name if open_spans else None
        starts.append(edge)
        names.append(OTHER if name == STEP else name)
    return starts, names


def device_seconds(events: Sequence[Event], timeline: Timeline) -> Counter[str]:
    """Seconds of kernels and copies by the phase that launched them."""
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
    """How often the host waited for the device, by phase; the wait at a step's end is left out."""
    waits: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in LAUNCHES and event["name"] in SYNCHRONISATIONS:
            phase = timeline.phase_at(event["ts"])
            if phase not in (None, WAITING):
                waits[str(phase)] += 1
    return waits


WARM_UP_STEPS = 2
Row = dict[str, Any]


def profile_steps(
    workload: Workload,
    *,
    device: torch.device,
    geometry: str | None = None,
    steps: int = 3,
    operators: int = 12,
    trace: Path | None = None,
) -> Row:
    """Profile some steps.

    Args:
        workload: what a step computes.
        device: where.
        geometry: of the noise scale, measured in every step; None: in none.
        steps: profiled ones, after two that are not.
        operators: how many of the costliest to name.
        trace: where to leave the Chrome trace (.json or .json.gz), for chrome://tracing or
            ui.perfetto.dev.

    Returns:
        A row for the step with its `phases` and its `operators`; seconds are those of one step, and
        small steps are slower under the profiler than they are.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as stack:
        trained = stack.enter_context(training(workload, device, [geometry] if geometry else []))
        for _ in range(WARM_UP_STEPS):
            named_step(trained, geometry)
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                named_step(trained, geometry)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = read_trace(path)
    head = {"measured": "profile", **workload.described(), "geometry": geometry, "steps": steps}
    if trace:
        head["trace"] = str(trace)
    return {
        **head,
        **totals(events, steps),
        "phases": phase_rows(events, steps),
        "operators": operator_rows(profiler.key_averages(), steps, operators, device),
    }


def named_step(trained: Training, geometry: str | None) -> None:
    """One step whose phases carry names in the trace; some have them in `step.py` already."""
    with record_function(STEP), measurement_named(trained, geometry):
        trained.step(geometry, named_each("data", trained.micro_batches))
        with record_function(WAITING):
            if trained.device.type == "cuda":
                torch.cuda.synchronize()


def named_each(name: str, items: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The same items; fetching each one is a range."""
    with record_function(name):
        remaining = items()
    while True:
        with record_function(name):
            item = next(remaining, None)
        if item is None:
            return
        yield item


@contextmanager
def measurement_named(trained: Training, geometry: str | None) -> Iterator[None]:
    """Name what the gradient tap does within the backward pass, hook by hook."""
    if geometry is None:
        yield
        return
    tap = trained.meters[geometry].tap
    see = tap._see

    def named(index: int, gradient: torch.Tensor) -> None:
        with record_function("measurement"):
            see(index, gradient)

    with patch.object(tap, "_see", named):
        yield


def read_trace(path: Path) -> list[Event]:
    """Events of a Chrome trace."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[Event] = json.loads(text)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def totals(events: list[Event], steps: int) -> Row:
    """Seconds of a step on the host, and on a GPU its share of busy time and its waits."""
    timeline = Timeline(events)
    seconds = sum(timeline.seconds().values()) / steps
    busy = sum(device_seconds(events, timeline).values()) / steps
    row: Row = {"seconds": round(seconds, 6)}
    if busy:
        row["device_busy_percent"] = round(100 * busy / seconds, 1)
        waits = synchronisations(events, timeline).total() / steps
        row["host_synchronisations_a_step"] = round(waits, 2)
    return row


def phase_rows(events: list[Event], steps: int) -> list[Row]:
    """Each phase's seconds on the host; on a GPU also those of what it launched there."""
    timeline = Timeline(events)
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
    """The costliest kernels of a GPU, or operators of the CPU, by their own time."""
    on_gpu = device.type == "cuda"
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for entry in averages:
        if entry.key in (STEP, *PHASES) or getattr(entry, "is_user_annotation", False):
            continue
        microseconds = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        if on_gpu == (entry.device_type == torch.autograd.DeviceType.CUDA):
            own[entry.key] += microseconds
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
