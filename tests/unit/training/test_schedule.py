import math

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.training.schedule import Schedule, ScheduleSettings, steps_in_budget


def published_schedule() -> Schedule:
    return Schedule(ScheduleSettings(), initial_batch_size=64, total_steps=24_415)


def test_budget_of_the_published_runs_takes_24415_steps():
    assert steps_in_budget(3_200_000_000, batch_size=64, sequence_length=2048) == 24_415


def test_budget_ends_with_the_first_whole_step_that_reaches_it():
    assert steps_in_budget(100, batch_size=5, sequence_length=10) == 2
    assert steps_in_budget(101, batch_size=5, sequence_length=10) == 3


def test_warmup_is_linear_in_sequences_and_reaches_the_peak():
    schedule = published_schedule()
    assert schedule.warmup_steps == 3662
    assert schedule.factor(0) == 1 / 3662
    assert schedule.factor(64 * 3661) == 1.0


def test_cosine_by_hand():
    # S = 11, W = 1: the decay lasts 9 steps, from v = 2 (1) over its middle to v = 11 (0).
    schedule = Schedule(ScheduleSettings(warmup_fraction=0.1), initial_batch_size=4, total_steps=11)
    assert schedule.factor(4) == 1.0
    assert schedule.factor(4 * 4) == pytest.approx((1 + math.cos(math.pi / 3)) / 2, rel=1e-12)
    assert schedule.factor(4 * 10) == 0.0


def test_factor_depends_on_sequences_not_on_how_many_steps_took_them():
    schedule = published_schedule()
    assert schedule.factor(64 * 5000) == schedule.factor(128 * 2500)
    between = schedule.factor(64 * 5000 + 32)
    assert schedule.factor(64 * 5001) < between < schedule.factor(64 * 5000)


def test_factor_stays_at_its_end_past_the_budget():
    settings = ScheduleSettings(final_fraction=0.1)
    schedule = Schedule(settings, initial_batch_size=1, total_steps=10)
    assert schedule.factor(9) == pytest.approx(0.1)
    assert schedule.factor(50) == pytest.approx(0.1)


def test_constant_schedule_keeps_the_peak_after_warmup():
    settings = ScheduleSettings(kind="constant", warmup_fraction=0.5)
    schedule = Schedule(settings, initial_batch_size=1, total_steps=10)
    assert [schedule.factor(i) for i in (0, 4, 5, 9)] == [0.2, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "linear"}, "schedule.kind=linear"),
        ({"warmup_fraction": 1.0}, "schedule.warmup_fraction=1.0"),
        ({"final_fraction": -0.1}, "schedule.final_fraction=-0.1"),
    ],
)
def test_bad_setting_is_named(values, named):
    with pytest.raises(InputError, match=named):
        ScheduleSettings(**values)
