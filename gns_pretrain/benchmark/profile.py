"""Where the time of a training step goes, by phase and by operator, with a Chrome trace."""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gns_pretrain.benchmark.trace import (
    OTHER,
    PHASES,
    STEP,
    WAITING,
    Event,
    Timeline,
    device_seconds,
    synchronisations,
)
from gns_pretrain.benchmark.workload import Training, Workload, training

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
