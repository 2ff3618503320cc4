import subprocess
import sys

import pytest

from benchmarks import harness
from benchmarks.harness import Timings, paired, this_process


def test_ratio_is_taken_pair_by_pair():
    # Ratios 1.2, 1.3 and 1.4, although the second pair ran while the machine was twice as slow.
    timings = Timings({"measured": [1.2, 2.6, 1.4], "plain": [1.0, 2.0, 1.0]})
    assert timings.quartiles("measured", "plain") == pytest.approx([1.2, 1.3, 1.4])
    assert timings.ratio("slower", "measured", "plain") == {
        "slower": 1.3,
        "slower_quartiles": [1.2, 1.4],
    }
    assert timings.median("measured") == 1.4


def test_cost_of_a_measurement_by_hand():
    # Measured steps take 1.2, 1.3 and 1.4 times as long: 30 % every step, 0.3 % every 100. The
    # median ones take 1.4 and 1.0 s.
    timings = Timings({"measured": [1.2, 2.6, 1.4], "plain": [1.0, 2.0, 1.0]})
    assert timings.cost("measured", "plain") == {
        "extra_seconds": 0.4,
        "cost_every_step_percent": 30.0,
        "quartiles_percent": [20.0, 40.0],
        "cost_every_100_steps_percent": 0.3,
    }


def test_stopwatch_warms_up_then_times_each_step_alternating(monkeypatch):
    # A clock that the steps move: 1 s for a, 3 s for b.
    calls, now = [], [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def step(name, seconds):
        calls.append(name)
        now[0] += seconds

    steps = {"a": lambda: step("a", 1.0), "b": lambda: step("b", 3.0)}
    timings = paired(steps, 3, this_process(), warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert timings.seconds == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert timings.quartiles("b", "a") == [3.0, 3.0, 3.0]


def test_waiting_threads_sleep_because_torch_is_loaded_after_the_package():
    # OpenMP reads the environment once, as torch is loaded.
    check = "import benchmarks, os, sys; print(os.environ['OMP_WAIT_POLICY'], *sys.modules)"
    command = ["env", "-u", "OMP_WAIT_POLICY", sys.executable, "-c", check]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    policy, *modules = answer.stdout.split()
    assert policy == "PASSIVE"
    assert "torch" not in modules
