"""The batch size in anybody's training loop: readings in, sizes and learning rates out."""

import json
import math
from dataclasses import dataclass

import pytest

from gns_pretrain.batch_size import AdaptiveBatchSize, PolicySettings, ShadowSettings
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import SmoothingSettings

NO_SMOOTHING = SmoothingSettings(noise_decay=0.0, signal_decay=0.0)


@dataclass
class Read:
    """A reading of a noise meter."""

    total: Measurement


def measured(noise, signal=1.0, *, geometry="manhattan", estimate="plug_in"):
    return Measurement(geometry, estimate, noise, signal, num_samples=8, batch_size=64)


def adaptive(settings=None, **arguments):
    """The sizes of the published runs, deciding before every step and without a warm-up."""
    options = {"warmup_fraction": 0.0, "decide_every_steps": 1} if settings is None else {}
    values = {
        "batch_size": 64,
        "micro_batch_size": 8,
        "num_ranks": 8,
        "micro_batch_max": 16,
        "micro_batch_step": 4,
        "total_samples": 64_000,
        "smoothing": NO_SMOOTHING,
    }
    return AdaptiveBatchSize(settings, **(values | options | arguments))


def after(*measurements, **arguments):
    """What has seen some measurements, a step each, and is now to decide."""
    it = adaptive(**arguments)
    for measurement in measurements:
        it.observe([measurement])
    return it


# A stranger's loop


def test_loop_grows_its_batch_and_learning_rate_with_the_noise_scale():
    # Signal 1 and theta 0.5: the target is 4 times the noise. Measured every 2 steps.
    it = adaptive(total_samples=800, theta=0.5)
    noises = {1: 10.0, 3: 25.0, 5: 70.0, 7: 20.0}
    seen, taken = [], []
    while it.samples < 800:
        seen.append((it.batch_size, it.micro_batch_size, it.accumulation, it.lr_multiplier))
        noise = noises.get(it.steps + 1)
        taken.append(it.step([Read(measured(noise))] if noise else []))
    held, grown, last = (64, 8, 1, 1.0), (96, 12, 1, 1.5**0.5), (256, 16, 2, 2.0)
    assert seen == [held] * 3 + [grown] * 2 + [last] * 2
    targets = [decision and decision.target for decision in taken]
    assert targets == [None, None, 100.0, None, 280.0, None, None]
    assert (it.steps, it.samples) == (7, 3 * 64 + 2 * 96 + 2 * 256)


def test_readings_of_another_geometry_than_the_followed_one_are_an_error():
    it = adaptive(geometry="nuclear")
    with pytest.raises(InputError, match=r"follows the noise scale nuclear/plug_in, .* manhattan"):
        it.step([Read(measured(100.0)), Read(measured(100.0, estimate="debiased"))])
    assert (it.steps, it.samples) == (0, 0)


def test_warm_up_is_a_share_of_the_budget():
    # floor(0.15 x 64,000 / 64) = 150 steps of 64 samples.
    it = adaptive(warmup_fraction=0.15, theta=0.5)
    decisions = [it.step([Read(measured(100.0))]) for _ in range(150)]
    assert decisions[:-1] == [None] * 149
    assert decisions[-1].split.batch_size == 384


def test_without_a_budget_the_cap_alone_bounds_the_batch():
    it = adaptive(total_samples=None, cap=256)
    assert it.step([Read(measured(1e308, 1e-12))]).split.batch_size == 256


def test_batch_is_no_larger_than_what_the_budget_has_left():
    it = adaptive(total_samples=64 + 130)
    decision = it.step([Read(measured(1e6))])
    assert decision.split.batch_size == 128
    assert "what the budget has left" in decision.why


def test_plan_counts_tokens_of_the_samples():
    it = adaptive(
        policy="staged", stage_tokens=[1280], stage_sizes=[128], tokens_per_sample=10, num_ranks=1
    )
    assert [it.step() and it.batch_size for _ in range(3)] == [None, 128, None]
    assert it.tokens == 10 * it.samples == 10 * (64 + 64 + 128)


def test_settings_as_an_object_are_the_same_as_options():
    options = {"policy": "norm_test", "theta": 0.5, "decide_every_steps": 1, "cap": 256}
    whole, parts = adaptive(PolicySettings(**options)), adaptive(**options)
    reading = Read(measured(40.0, geometry="euclidean"))
    assert whole.step([reading]) == parts.step([reading])
    assert whole.batch_size == 256
    assert whole.state_dict() == parts.state_dict()


# Averages


def test_measurements_of_another_geometry_or_estimate_are_not_followed():
    it = after(measured(100.0, geometry="euclidean"), measured(100.0, estimate="debiased"))
    assert it.noise_for(it.followed) is None
    assert it.averages["euclidean/plug_in"].smoothed.noise == 100.0


def test_policy_without_decays_of_its_own_follows_what_is_logged_and_another_its_own():
    it = adaptive(
        theta=1.0,
        shadows=[
            ShadowSettings(noise_decay=0.9, signal_decay=0.9, name="slow"),
            ShadowSettings("norm_test", name="norm"),
        ],
    )
    for noise in (10.0, 30.0):
        it.observe([measured(noise), measured(9.0, estimate="debiased")])
    assert set(it.averages) == {
        "manhattan/plug_in",
        "manhattan/debiased",
        "manhattan/plug_in/slow",
        "euclidean/plug_in/norm",
    }
    logged = it.averages["manhattan/plug_in"].smoothed
    assert it.noise_for(it.followed) == logged
    assert logged.noise == 30.0
    slow, norm = (it.noise_for(shadow) for shadow in it.shadows)
    assert slow.noise == pytest.approx((0.9 * 1.0 + 0.1 * 30.0) / 0.19)  # 20.5
    assert norm is None


def test_averages_begin_with_the_first_measurement_itself():
    it = after(measured(100.0), smoothing=SmoothingSettings(), theta=1.0)
    assert it.decide()[0].target == pytest.approx(100.0)


def test_norm_test_looks_at_the_last_measurement_alone():
    noises = (measured(noise, geometry="euclidean") for noise in (1e6, 100.0))
    it = after(*noises, policy="norm_test", theta=1.0, smoothing=SmoothingSettings())
    assert it.decide()[0].target == 100.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_measurement_that_is_not_finite_changes_no_average(bad):
    assert after(measured(bad)).decide() == (None, [])
    it = after(measured(50.0))
    saved = it.state_dict()
    it.observe([measured(1.0, bad)])
    for name in ("averages", "recent_noise_scales"):
        assert it.state_dict()[name] == saved[name]


def test_shadows_decide_from_their_own_sizes_and_what_is_followed_stays():
    shadow = ShadowSettings(name="shadow", warmup_fraction=0.0, decide_every_steps=1)
    it = adaptive(theta=9.0, shadows=[shadow])
    found = []
    for noise in (42.8, 42.8, 60.0):
        it.observe([measured(noise)])
        decision, of_shadows = it.decide()
        assert decision is None
        found += [(d.policy, it.steps, d.previous, d.split.batch_size) for d in of_shadows]
    assert found == [("shadow", 1, 64, 96), ("shadow", 3, 96, 128)]


# Resumption


def several(**arguments):
    shadow = {"warmup_fraction": 0.0, "decide_every_steps": 2}
    return adaptive(
        theta=0.5,
        smoothing=SmoothingSettings(),
        shadows=[
            ShadowSettings(theta=0.4, noise_decay=0.5, name="own", **shadow),
            ShadowSettings("norm_test", name="norm", **shadow),
        ],
        **arguments,
    )


def fed(it, steps):
    """The decisions of each step, measured with a noise that grows."""
    found = []
    for step in steps:
        it.observe([measured(10.0 + step), measured(5.0 + step, geometry="euclidean")])
        found.append(it.decide())
    return found


def test_saved_and_loaded_in_the_middle_it_decides_as_if_it_had_not_stopped():
    whole, first, second = several(), several(), several()
    expected = fed(whole, range(0, 360, 40))
    assert sum(decision is not None for decision, _ in expected) >= 3
    assert any(of_shadows for _, of_shadows in expected)
    found = fed(first, range(0, 160, 40))
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict()))) is None
    assert found + fed(second, range(160, 360, 40)) == expected
    assert second.state_dict() == whole.state_dict()


# What a checkpoint of an earlier version holds, when the record and each policy kept averages of
# their own.
EARLIER = {
    "batch_size": 96,
    "micro_batch_size": 12,
    "step": 15,
    "samples": 1000,
    "tokens": 128000,
    "lr_multiplier": 1.5**0.5,
    "averages": {
        key: {"noise": noise, "signal": 0.5, "noise_weight": 0.1, "signal_weight": 0.1}
        for key, noise in (
            ("manhattan/plug_in", 3.0),
            ("manhattan/plug_in/adaptive", 3.0),
            ("manhattan/plug_in/own", 4.0),
            ("euclidean/plug_in/norm", 7.0),
        )
    },
    "recent_noise_scales": {"manhattan/plug_in": [6.0, 8.0]},
    "shadow_batch_sizes": {"own": 128},
}


def test_state_of_an_earlier_checkpoint_is_read():
    it = several(tokens_per_sample=128)
    assert it.load_state_dict(json.loads(json.dumps(EARLIER))) is None
    saved = it.state_dict()
    for name in EARLIER.keys() - {"averages", "recent_noise_scales"}:
        assert saved[name] == EARLIER[name], name
    copied = EARLIER["averages"].keys() - {"manhattan/plug_in/adaptive"}
    assert saved["averages"] == {key: EARLIER["averages"][key] for key in copied}
    assert it.averages["manhattan/plug_in"].spread == 2**0.5


def test_other_ranks_that_can_take_the_batch_keep_it_and_its_learning_rate():
    it = several(num_ranks=2)
    assert it.load_state_dict(EARLIER | {"lr_multiplier": 7.0}) is None
    assert (it.batch_size, it.micro_batch_size, it.accumulation) == (96, 12, 4)
    assert it.lr_multiplier == 7.0


def test_other_ranks_that_cannot_take_the_batch_take_the_next_larger_and_say_so():
    # 5 ranks take 2 micro-batches each, of 8 to 16 samples in steps of 4: 80, 120, ...
    it = several(num_ranks=5)
    decision = it.load_state_dict(EARLIER)
    assert (decision.previous, it.batch_size) == (96, 120)
    assert it.lr_multiplier == decision.lr_multiplier == (120 / 64) ** 0.5
    assert "96 is not feasible on 5 ranks" in decision.why


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "^batch_size=0 must be at least 1"),
        ({"num_ranks": 0}, "^num_ranks=0 must be at least 1"),
        ({"micro_batch_max": 4}, "^micro_batch_max=4 is below micro_batch_size=8"),
        ({"theta": -1.0}, "^theta=-1.0 must be positive"),
        ({"policy": "adaptiv"}, "^policy=adaptiv is not known; use one of .*adaptive"),
        ({"geometry": "euclidean", "target": "inflection"}, "^target=.*inflection is not known"),
        ({"cap": 32}, "^cap=32 is below batch_size=64; a batch never shrinks"),
        ({"shadows": [ShadowSettings(theta=0.0)]}, r"^shadows\[0\].theta=0.0 must be positive"),
        ({"shadows": [ShadowSettings(name="adaptive")]}, "the policy adaptive more than once"),
        ({"policy": "staged"}, r"^stage_tokens=\[\] and stage_sizes=\[\] must both rise"),
        (
            {"policy": "linear_ramp", "ramp_size": 128, "ramp_tokens": 9},
            "^policy=linear_ramp plans in tokens, and tokens_per_sample is not given",
        ),
        (
            {"total_samples": None, "cap": 256, "warmup_fraction": 0.15},
            "^warmup_fraction=0.15 is a share of the budget, and total_samples is not given",
        ),
        (
            {"total_samples": None},
            "^policy=adaptive may grow without bound; give cap or total",
        ),
        (
            {"policy": "seesaw", "total_samples": None, "lr_decay": lambda samples: 0.5},
            "^policy=seesaw may grow without bound; give cap or total_samp",
        ),
        ({"policy": "seesaw"}, "^policy=seesaw follows the learning rate's schedule, and lr_decay"),
    ],
)
def test_argument_that_breaks_a_rule_is_named_as_it_was_written(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        adaptive(**arguments)
    assert "\n" not in str(error.value)
    assert "batch_size." not in str(error.value)


def test_settings_and_options_together_are_refused():
    with pytest.raises(InputError, match=r"^theta=0\.5 is given beside settings"):
        adaptive(PolicySettings("adaptive"), theta=0.5)


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (80, "^batch_size=80 is not feasible on 8 ranks .*; use batch_size=64 or batch_size=96"),
        (32, "^batch_size=32 .* at least min_samples=8 of them a step.* or micro_batch_size=4$"),
    ],
)
def test_batch_that_the_ranks_cannot_take_is_refused_before_the_first_step(batch_size, message):
    it = adaptive(batch_size=batch_size)
    with pytest.raises(InputError, match=message):
        it.accumulation  # noqa: B018


# Progress: no theta


def nested(bend, batch_size=64, *, factor=1.0):
    gains = tuple(
        factor * math.sqrt(n / (n + bend)) for n in (batch_size / 8, batch_size / 4, batch_size / 2)
    )
    return Measurement("manhattan", "nested", 0.0, 0.0, 8, batch_size, gains)


@pytest.mark.parametrize(
    ("bend", "taken"),
    [
        (0.0, None),
        (150.0, None),  # a step of 64 gives up more than a tenth below 3.3 x 64 = 209
        (350.0, 96),  # a tenth at 350 / 3.26 = 107
        (1e9, 128),  # twice the measured batch, no more
    ],
)
def test_batch_grows_to_what_the_price_pays_for(bend, taken):
    it = after(*[nested(bend)] * 4, policy="progress", price=0.1)
    decision, _ = it.decide()
    assert (decision and decision.split.batch_size) == taken


def test_progress_waits_for_four_measurements_and_counts_their_spread():
    sure = [nested(1e9)] * 3
    it = after(*sure, policy="progress")
    assert it.decide() == (None, [])
    it.observe([nested(1e9)])
    assert it.decide()[0].split.batch_size == 128
    # As large on average, but by one measurement alone.
    unsure = after(*[nested(1.0)] * 3, nested(1e9, factor=300.0), policy="progress")
    assert unsure.decide() == (None, [])


def test_progress_decides_the_same_after_its_state_was_saved():
    saved = after(*[nested(350.0)] * 4, policy="progress")
    state = json.loads(json.dumps(saved.state_dict()))
    it = adaptive(policy="progress")
    it.load_state_dict(state)
    assert it.decide() == saved.decide()
    assert it.batch_size == 96
