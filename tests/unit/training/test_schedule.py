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


def test_decay_is_the_factor_after_the_peak():
    schedule = Schedule(ScheduleSettings(warmup_fraction=0.2), initial_batch_size=4, total_steps=20)
    assert [schedule.decay(4 * step) for step in range(4)] == [1.0] * 4
    assert 0.0 < schedule.decay(4 * 10) == schedule.factor(4 * 10) < 1.0


@pytest.mark.parametrize(
    ("form", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)]
)
def test_wsd_stays_at_the_peak_and_decays_over_its_share(form, middle):
    # S = 20, W = 2, D = 16: the last four steps decay, to a tenth of the peak.
    settings = ScheduleSettings("wsd", 0.1, 0.1, decay_fraction=0.2, decay_form=form)
    schedule = Schedule(settings, initial_batch_size=2, total_steps=20)
    factors = [schedule.factor(2 * step) for step in range(20)]
    assert factors[0] == 0.5
    assert factors[1:16] == [1.0] * 15
    assert factors[17] == pytest.approx(0.1 + 0.9 * middle, rel=1e-12)
    assert factors[19] == pytest.approx(0.1, rel=1e-12)
    assert 1.0 > schedule.factor(2 * 15 + 1) > factors[16]
    assert schedule.factor(400) == pytest.approx(0.1, rel=1e-12)


def test_wsd_of_a_smaller_budget_is_a_decay_branch_of_a_larger_one():
    settings = ScheduleSettings("wsd", 0.05, decay_fraction=0.25)
    stable = Schedule(settings, initial_batch_size=8, total_steps=1000)
    branch = Schedule(settings, initial_batch_size=8, total_steps=400)
    assert stable.factor(8 * 299) == branch.factor(8 * 299) == 1.0
    assert branch.factor(8 * 300) == 1.0 - 1 / 100
    assert branch.factor(8 * 399) == 0.0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "wsd", "warmup_fraction": 0.9}, "schedule.warmup_fraction=0.9 and schedule"),
        ({"kind": "linear"}, "schedule.kind=linear"),
        ({"warmup_fraction": 1.0}, "schedule.warmup_fraction=1.0"),
        ({"final_fraction": -0.1}, "schedule.final_fraction=-0.1"),
    ],
)
def test_bad_setting_is_named(values, named):
    with pytest.raises(InputError, match=named):
        ScheduleSettings(**values)
