"""From a Chrome trace to seconds by phase of a training step: pure functions of its events.

A phase is a range of `torch.profiler.record_function`. Ranges nest, on the thread that runs the
backward pass too; a moment belongs to the innermost range that holds it, whichever thread opened
it. What a GPU does belongs to the phase in which the host has launched it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
