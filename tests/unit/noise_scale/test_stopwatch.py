"""The time of a measurement: the host's on a CPU, the device's own elsewhere."""

import time
from types import SimpleNamespace

import pytest
import torch

from gns_pretrain.noise_scale.stopwatch import Stopwatch


def test_cpu_counts_the_blocks_alone(monkeypatch):
    ticks = iter([1.0, 1.5, 10.0, 10.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.running():
            pass
    assert stopwatch.seconds() == 0.75


class Event:
    """An event of a device whose clock is at `now` milliseconds."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_device_counts_in_its_own_time_and_is_asked_at_the_end_alone(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(time, "perf_counter", None)
    stopwatch = Stopwatch(torch.device("cuda"))
    for start, end in ((0.0, 3.0), (100.0, 104.0)):
        Event.now = start
        with stopwatch.running():
            Event.now = end
    assert stopwatch.seconds() == pytest.approx(0.007)
