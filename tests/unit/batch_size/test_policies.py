"""What each policy wants, and what a controller makes of it."""

import dataclasses
import math

import pytest

from gns_pretrain.batch_size.controller import Controller
from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policies import PolicySettings, Position
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale, SmoothingSettings

PUBLISHED = FeasibleSizes(
    num_ranks=8, micro_batch_size=8, micro_batch_max=16, micro_batch_step=4, min_samples=8
)


def controller(name="it", **settings):
    values = PolicySettings(**({"policy": "adaptive", "warmup_fraction": 0.0} | settings))
    values.check("batch_size")
    return Controller(name, values.kind(values, initial_batch_size=64, total_steps=1000), PUBLISHED)


def policy(**settings):
    return controller(**settings).policy


def before(step, *, samples=0, tokens=0, samples_left=10**9):
    return Position(step, samples, tokens, samples_left)


def noise_scale(value):
    return SmoothedNoiseScale(value, 1.0, value)


def decided(noise, *, batch_size=64, position=None, **settings):
    """The decision at a signal of 1."""
    it = controller(**settings)
    return it.decide(position or before(10), batch_size, noise_scale(noise))


# Policies


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"theta": 0.6}, 100.0),
        ({"theta": 1.2}, 25.0),
        ({"target": "kappa", "kappa": 0.16}, 100.0),  # (1 - 0.6)^2
        ({"target": "inflection"}, 64.0),  # 16 / 9
        ({"target": "corrected_inflection"}, 64.0),
        ({"target": "inflection_v1"}, 256.0),  # 64 / 9
        ({"target": "maximum_efficiency"}, 144.0),
        ({"geometry": "nuclear", "target": "maximum_efficiency"}, 144.0),
        ({"geometry": "euclidean", "target": "kappa", "kappa": 0.75}, 108.0),  # 3 x
    ],
)
def test_adaptive_targets_of_a_noise_scale_of_36(settings, wanted):
    assert policy(**settings).target(before(10), noise_scale(36.0)) == pytest.approx(wanted)


def test_adaptive_decides_before_every_step_that_its_interval_divides_and_at_no_other():
    it = policy(decide_every_steps=10)
    steps = [step for step in range(1, 41) if it.target(before(step), noise_scale(36.0))]
    assert steps == [10, 20, 30, 40]


def test_adaptive_waits_until_the_warm_up_has_been_consumed():
    # floor(0.15 x 1000) steps of 64 sequences.
    it = policy(warmup_fraction=0.15)
    assert it.target(before(10, samples=150 * 64 - 1), noise_scale(36.0)) is None
    assert it.target(before(10, samples=150 * 64), noise_scale(36.0)) is not None


@pytest.mark.parametrize("target", ["theta", "kappa", "maximum_efficiency"])
def test_adaptive_takes_no_decision_without_a_signal_or_a_measurement(target):
    it = policy(target=target)
    assert it.target(before(10), SmoothedNoiseScale(36.0, 0.0, None)) is None
    assert it.target(before(10), None) is None


def test_staged_sizes_begin_at_their_tokens():
    it = policy(policy="staged", stage_tokens=[1000, 2000], stage_sizes=[96, 128])
    found = [it.target(before(1, tokens=tokens), None) for tokens in (0, 999, 1000, 1999, 2000)]
    assert found == [None, None, 96, 96, 128]


def test_linear_ramp_goes_from_the_initial_size_to_its_own_over_its_tokens():
    it = policy(policy="linear_ramp", ramp_size=264, ramp_tokens=1000)
    found = [it.target(before(1, tokens=tokens), None) for tokens in (0, 250, 1000, 5000)]
    assert found == [64.0, 114.0, 264.0, 264.0]


def test_exponential_doubles_each_period():
    it = policy(policy="exponential", growth_tokens=1000)
    found = [it.target(before(1, tokens=tokens), None) for tokens in (0, 999, 1000, 2999, 3000)]
    assert found == [64.0, 64.0, 128.0, 256.0, 512.0]
    assert it.target(before(1, tokens=10**9), None) == math.inf
    with pytest.raises(InputError, match=r"growth_tokens=null must be at least 1 for it\.pol"):
        PolicySettings(policy="exponential").check("it")


def test_seesaw_gives_the_batch_what_the_schedule_takes_from_the_learning_rate():
    it = policy(policy="seesaw")
    position = dataclasses.replace(before(1), lr_decay=0.25)
    assert it.target(position, None) == 256.0
    # At a size that is feasible the rate is the peak's times the square root of the decay.
    decision = controller(policy="seesaw").decide(position, 64, None)
    assert decision.split.batch_size == 256
    assert 0.25 * decision.lr_multiplier == 0.25**0.5
    finished = dataclasses.replace(before(1, samples_left=500), lr_decay=0.0)
    assert it.target(finished, None) == math.inf
    assert controller(policy="seesaw").decide(finished, 64, None).split.batch_size == 384


def test_norm_test_fails_exactly_where_variance_over_batch_exceeds_eta_squared_norm_squared():
    # Variance 32 of one sequence, squared norm 1: at B = 128 both sides are 1/4.
    assert decided(32.0, batch_size=96, policy="norm_test", theta=0.5).split.batch_size == 128
    assert decided(32.0, batch_size=128, policy="norm_test", theta=0.5) is None


def test_constant_never_decides():
    assert decided(1e9, policy="constant") is None


# Controller


def test_decision_rounds_down_scales_the_learning_rate_and_says_why():
    decision = decided(42.8, theta=0.6)
    assert decision.target == pytest.approx(118.889, abs=1e-3)
    assert decision.split.batch_size == 96
    assert decision.lr_multiplier == pytest.approx(1.5**0.5)
    assert decision.why == "rounded down to 96 = 8 ranks x 12"


def test_rounding_up_takes_the_next_size_and_leaves_a_feasible_target_alone():
    assert decided(42.8, theta=0.6, rounding="up").split.batch_size == 128
    assert decided(96.0, theta=1.0, rounding="up").split.batch_size == 96


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_batch_never_shrinks(rounding):
    assert decided(42.8, theta=0.6, rounding=rounding, batch_size=128) is None


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_cap_bounds_the_size_and_is_named(rounding):
    decision = decided(1e6, cap=256, rounding=rounding)
    assert decision.split.batch_size == 256
    assert "limited to cap=256" in decision.why
    assert decided(150.0, theta=1.0, cap=128, rounding=rounding).split.batch_size == 128
    assert decided(1e6, cap=256, rounding=rounding, batch_size=256) is None


@pytest.mark.parametrize("noise", [1e6, 1e308])
def test_target_without_bound_is_held_to_what_the_budget_has_left(noise):
    # 1e308 / 0.001^2 is infinite.
    decision = decided(noise, theta=0.001, position=before(10, samples_left=300))
    assert decision.split.batch_size == 256
    assert "what the budget has left" in decision.why
    assert decided(noise, position=before(10, samples_left=50)) is None


def test_size_rounded_up_past_what_the_budget_has_left_is_rounded_down():
    left = before(10, samples_left=110)
    decision = decided(100.0, theta=1.0, rounding="up", position=left)
    assert decision.split.batch_size == 96
    assert "what the budget has left" in decision.why


def test_learning_rate_multiplier_of_a_batch_four_times_the_first():
    found = [decided(1e6, cap=256, lr_scaling=scaling) for scaling in ("sqrt", "linear", "none")]
    assert [decision.lr_multiplier for decision in found] == [2, 4, 1]


def test_decays_of_a_policy_are_those_of_the_noise_scale_unless_it_has_its_own():
    shared = SmoothingSettings(noise_decay=0.8, signal_decay=0.7)
    own = policy(signal_decay=0.5).own_smoothing(shared)
    assert (own.noise_decay, own.signal_decay) == (0.8, 0.5)
    assert policy().own_smoothing(shared) is None
