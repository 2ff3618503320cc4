"""The batch of the most progress per second: how long a step takes, and what follows from it."""

import json

import pytest

from gns_pretrain.batch_size import AdaptiveBatchSize, ShadowSettings
from gns_pretrain.batch_size.step_times import KEPT, NEEDED, StepTimes
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import SmoothingSettings


class Read:
    """A reading of a noise meter, of a signal of 1."""

    def __init__(self, noise_scale: float) -> None:
        self.total = Measurement("euclidean", "plug_in", noise_scale, 1.0, 8, 64)


def timed(steps: dict[int, list[float]]) -> StepTimes:
    times = StepTimes()
    for size, seconds in steps.items():
        for each in seconds:
            times.include(size, each)
    return times


def steady(**seconds_of: float) -> StepTimes:
    return timed({int(size[1:]): [seconds] * NEEDED for size, seconds in seconds_of.items()})


# Seconds of a step


def test_a_line_through_two_sizes_has_their_fixed_and_per_sample_part():
    found = steady(B16=3.0, B48=5.0).fitted  # 2 s for 32 samples
    assert (found.fixed, found.per_sample, found.overhead) == (2.0, 1 / 16, 32.0)
    assert str(found) == "a step takes 2 s and 0.0625 s a sample, by 2 batch sizes"


def test_half_a_step_counts_as_fixed_while_one_size_was_timed_and_the_text_says_so():
    found = steady(B16=3.0).fitted
    assert (found.fixed, found.per_sample, found.overhead) == (1.5, 1.5 / 16, 16.0)
    assert "50% fixed by assumption: only 16 was timed yet" in str(found)


def test_outliers_and_what_is_long_past_do_not_count():
    slow = [90.0, *[3.0] * NEEDED, 70.0]  # a compilation, a busy minute
    assert timed({16: slow}).fitted == steady(B16=3.0).fitted
    assert timed({16: [9.0] * KEPT + [3.0] * KEPT}).fitted == steady(B16=3.0).fitted


def test_no_line_until_the_largest_size_has_been_timed_often_enough():
    assert StepTimes().fitted is None
    times = steady(B16=3.0)
    for _ in range(NEEDED):
        times.include(48, 5.0)
        assert (times.fitted is None) == (len(times.state_dict()["48"]) < NEEDED)


@pytest.mark.parametrize(
    ("seconds", "fixed", "per_sample"),
    [
        ((3.0, 2.0), 2.5, 0.0),  # a larger batch took no longer
        ((1.0, 3.5), 0.0, (16 * 1.0 + 48 * 3.5) / (16**2 + 48**2)),  # more than in proportion
    ],
)
def test_neither_part_is_ever_negative(seconds, fixed, per_sample):
    found = steady(B16=seconds[0], B48=seconds[1]).fitted
    assert (found.fixed, found.per_sample) == pytest.approx((fixed, per_sample))


# Decisions


def goodput(**arguments) -> AdaptiveBatchSize:
    values = {
        "policy": "goodput",
        "geometry": "euclidean",
        "batch_size": 16,
        "micro_batch_size": 2,
        "micro_batch_max": 10**6,
        "total_samples": 10**6,
        "warmup_fraction": 0.0,
        "decide_every_steps": 10,
        "smoothing": SmoothingSettings(noise_decay=0.0, signal_decay=0.0),
    }
    return AdaptiveBatchSize(**(values | arguments))


def fed(it: AdaptiveBatchSize, steps: int, *, fixed=64.0, noise_scale=100.0) -> list[int]:
    """Batch sizes of steps of fixed + B seconds."""
    sizes = []
    for _ in range(steps):
        sizes.append(it.batch_size)
        it.step([Read(noise_scale)], seconds=fixed + it.batch_size)
    return sizes


def test_batch_doubles_at_most_until_it_has_the_most_progress_per_second():
    # At sqrt(64 x 100) = 80. With one size timed: sqrt(16 x 100) = 40, and twice 16 is less.
    sizes = fed(goodput(), 40)
    assert sizes == [16] * 9 + [32] * 10 + [64] * 10 + [80] * 11

    def per_second(size: float) -> float:
        return size / (size + 100.0) / (64.0 + size)

    assert per_second(80) > max(per_second(72), per_second(88))


def test_batch_without_a_fixed_part_stays_once_that_is_known():
    assert set(fed(goodput(), 100, fixed=0.0)[40:]) == {32}


def test_reason_says_how_long_a_step_takes():
    it = goodput()
    fed(it, 8)
    decision = it.step([Read(100.0)], seconds=80.0)
    assert decision.why.endswith("50% fixed by assumption: only 16 was timed yet")


def test_saved_and_loaded_it_decides_as_if_it_had_not_stopped():
    whole = goodput()
    expected = fed(whole, 60)
    for stop in (5, 9, 15, 33):
        first, second = goodput(), goodput()
        found = fed(first, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + fed(second, 60 - stop) == expected
        assert second.state_dict() == whole.state_dict()


def test_seconds_of_other_ranks_are_forgotten():
    first, second = goodput(), goodput(num_ranks=2)
    fed(first, 9)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["step_seconds"] == {}
    assert second.batch_size == 32


def test_shadow_weighs_the_seconds_of_the_run_that_it_watches():
    shadow = ShadowSettings(
        "goodput", geometry="euclidean", warmup_fraction=0.0, name="it", cap=1000
    )
    it = goodput(policy="constant", shadows=[shadow])
    for _ in range(39):
        assert it.seconds_due == (it.steps % 10 == 9)
        assert set(fed(it, 1)) == {16}
    # Never more than twice what was timed, and that is the constant batch.
    assert it.state_dict()["shadow_batch_sizes"] == {"it": 32}


def test_loop_that_gives_no_seconds_is_told_to():
    with pytest.raises(InputError, match=r"goodput weighs the seconds .* step\(readings, seconds="):
        goodput().step([Read(100.0)])
    constant = goodput(policy="constant")
    assert constant.step([Read(100.0)]) is None
    assert constant.state_dict()["step_seconds"] == {}
