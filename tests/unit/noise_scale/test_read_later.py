"""Readings that come some steps after the one they measured, in anybody's loop."""

import json
import threading

import pytest
import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale import geometries, host_spectra
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings

EVERY, LATER, STEPS = 5, 3, 14


class Loop:
    """The loop of the README: it measures, reads at every step, and updates."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Linear(5, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.inputs = torch.randn(STEPS, 4, 2, 6)
        options = {"every_steps": EVERY, "square_root": "exact"} | options
        self.meter = NoiseMeter(
            self.model,
            geometries=["euclidean", "manhattan", "nuclear"],
            estimates=["plug_in", "cross_fitted"],
            matrices=lambda name, parameter: parameter.ndim == 2,
            per_layer=True,
            **options,
        )

    def step(self, number: int) -> list[Reading]:
        with self.meter.step(number):
            for inputs in self.inputs[number - 1]:
                with self.meter.sample():
                    (self.model(inputs).square().mean() / 4).backward()
        readings = self.meter.read(batch_size=8)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return readings


def numbers(readings: list[Reading]) -> list[tuple]:
    """All that a reading says but for the clock's seconds."""
    return [(r.step, r.total, r.parts, r.details) for r in readings]


@pytest.fixture(scope="module")
def read_at_once() -> dict[int, list[tuple]]:
    loop = Loop()
    found = {step: numbers(loop.step(step)) for step in range(1, STEPS + 1)}
    return {step: readings for step, readings in found.items() if readings}


def test_later_readings_have_the_bits_of_immediate_ones(read_at_once):
    assert list(read_at_once) == [1, 5, 10]
    loop = Loop(read_after_steps=LATER)
    threads = torch.get_num_threads()
    for step in range(1, STEPS + 1):
        found = numbers(loop.step(step))
        assert found == read_at_once.get(step - LATER, [])
        assert loop.meter.pending == any(m <= step < m + LATER for m in read_at_once)
    assert torch.get_num_threads() == threads


def test_automatic_roots_are_exact_where_they_are_read_later(read_at_once):
    loop = Loop(read_after_steps=LATER, square_root="auto")
    found = [numbers(loop.step(step)) for step in range(1, 2 + LATER)]
    assert found[-1] == read_at_once[1]


def test_iterative_roots_may_be_read_later_too():
    once, later = (Loop(square_root="iterative", read_after_steps=d) for d in (0, 2))
    expected = numbers(once.step(1))
    assert [numbers(later.step(step)) for step in (1, 2, 3)] == [[], [], expected]


def test_what_is_pending_can_be_read_at_the_end(read_at_once):
    loop = Loop(read_after_steps=LATER)
    for step in range(1, 11):
        loop.step(step)
    assert numbers(loop.meter.read_pending()) == read_at_once[10]
    assert (loop.meter.pending, loop.meter.read_pending()) == (False, [])


@pytest.mark.parametrize("saved_at", range(5, 5 + LATER))
def test_saved_while_pending_it_is_read_at_the_same_step(saved_at, read_at_once):
    loop = Loop(read_after_steps=LATER)
    for step in range(1, saved_at + 1):
        loop.step(step)
    state = json.loads(json.dumps(loop.meter.state_dict()))
    for meter in (loop.meter, Loop(read_after_steps=LATER).meter):
        if meter is not loop.meter:
            meter.load_state_dict(state)
            loop.meter = meter
        for step in range(saved_at + 1, 5 + LATER):
            with meter.step(step):
                assert meter.read(batch_size=8) == []
        with meter.step(5 + LATER):
            assert numbers(meter.read(batch_size=8)) == read_at_once[5]
    assert meter.state_dict() == {}
    Loop().meter.load_state_dict({})  # as an older checkpoint has it


def test_error_of_a_host_thread_is_raised_where_the_reading_is_due(monkeypatch):
    def fail(gram):
        raise RuntimeError("LAPACK did not converge")

    monkeypatch.setattr(geometries, "exact_trace", fail)
    loop = Loop(read_after_steps=LATER)
    for step in range(1, 1 + LATER):
        assert loop.step(step) == []
    with pytest.raises(RuntimeError, match="did not converge"):
        loop.step(1 + LATER)


@pytest.fixture
def three_threads():
    """Torch with three threads, which tells them from those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_host_threads_take_one_core_each_and_leave_others_theirs(monkeypatch, three_threads):
    monkeypatch.setattr(host_spectra, "available_cores", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    worker = host_spectra.host_threads.__wrapped__()
    assert [thread.name for thread in worker.threads] == ["noise-scale-0", "noise-scale-1"]
    assert all(thread.daemon for thread in worker.threads)
    assert worker.start(torch.get_num_threads).result() == 1
    fresh: list[int] = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), fresh) == (3, [3])
    worker.end()


@pytest.mark.parametrize("later", [5, 7])
def test_reading_that_would_come_after_the_next_measurement_is_refused(later):
    with pytest.raises(InputError, match=rf"read_after_steps={later} must be below .*_steps=5"):
        NoiseScaleSettings(["manhattan"], every_steps=5, read_after_steps=later)
