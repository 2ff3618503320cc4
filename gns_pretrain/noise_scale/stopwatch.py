"""How long the blocks of code of one measurement take, where they run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of the blocks within `running`: the host's on a CPU, else the device's own.

    A device runs behind the host, which would count what it waits for: events mark the blocks in
    the stream's own time, idle moments between their kernels included.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None if device.type == "cpu" else torch.get_device_module(device).Event
        self._spans: list[tuple[torch.Event, torch.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count this block."""
        if self._event is None:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        start, end = self._event(enable_timing=True), self._event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._spans.append((start, end))

    def seconds(self) -> float:
        """Return the sum; where blocks ran on a device, once it has been waited for."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._spans) / 1000
