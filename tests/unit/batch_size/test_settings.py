"""Settings of the batch size that cannot be meant, each with the rule and a hint."""

import pytest

from gns_pretrain.batch_size.settings import BatchSizeSettings, ShadowSettings
from gns_pretrain.errors import InputError


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"initial": 0}, "batch_size.initial=0 must be at least 1 sequence"),
        ({"policy": "adaptiv"}, "batch_size.policy=adaptiv .* constant, adaptive, goodput"),
        ({"rounding": "nearest"}, "batch_size.rounding=nearest .* down, up"),
        ({"lr_scaling": "cubic"}, "batch_size.lr_scaling=cubic .* sqrt, linear, none"),
        ({"geometry": "spherical"}, "batch_size.geometry=spherical .* euclidean, manhattan"),
        ({"geometry": "nuclear", "estimate": "debiased"}, "estimate=debiased .* nuclear; use one"),
        ({"target": "knee"}, "batch_size.target=knee .* theta, kappa, inflection"),
        ({"theta": 0.0}, "batch_size.theta=0.0 must be positive .* the paper uses 0.6"),
        ({"theta": -1.0}, "batch_size.theta=-1.0 must be positive"),
        ({"theta": float("nan")}, "batch_size.theta=nan must be positive"),
        ({"theta": float("inf")}, "batch_size.theta=inf must be positive and finite"),
        ({"kappa": 1.0}, "batch_size.kappa=1.0 .* between 0 and 1"),
        ({"noise_decay": 1.0}, "batch_size.noise_decay=1.0 must be at least 0 and below 1"),
        ({"signal_decay": -0.1}, "batch_size.signal_decay=-0.1 must be at least 0 and below 1"),
        ({"decide_every_steps": 0}, "batch_size.decide_every_steps=0 must be at least 1 step"),
        ({"warmup_fraction": 1.0}, "batch_size.warmup_fraction=1.0 .* below 1; the paper"),
        ({"warmup_fraction": -0.1}, "batch_size.warmup_fraction=-0.1 .* at least 0"),
        (
            {"geometry": "euclidean", "target": "inflection"},
            "inflection .* euclidean; use one of theta, kappa$",
        ),
        ({"cap": 8}, "batch_size.cap=8 is below batch_size.initial=16; .* raise the cap"),
        ({"micro_batch_max": 0}, "batch_size.micro_batch_max=0 must be at least 1"),
        ({"micro_batch_step": 0}, "batch_size.micro_batch_step=0 must be at least 1"),
        ({"policy": "staged"}, r"batch_size.stage_tokens=\[\] .* as in stage_tokens="),
        (
            {"policy": "staged", "stage_tokens": [5, 5], "stage_sizes": [32, 64]},
            r"stage_tokens=\[5, 5\] .* must both rise",
        ),
        (
            {"policy": "staged", "stage_tokens": [5, 6], "stage_sizes": [64, 32]},
            r"stage_sizes=\[64, 32\] must both rise",
        ),
        (
            {"policy": "staged", "stage_tokens": [5], "stage_sizes": [32, 64]},
            "of one length",
        ),
        (
            {"policy": "staged", "stage_tokens": [5, 9], "stage_sizes": [8, 32]},
            "batch_size.stage_sizes=8 is below batch_size.initial=16; .* never shrinks: raise it",
        ),
        (
            {"policy": "linear_ramp", "ramp_size": 8, "ramp_tokens": 5},
            "batch_size.ramp_size=8 is below batch_size.initial=16; a batch never shrinks",
        ),
        (
            {"shadows": [ShadowSettings("linear_ramp", ramp_size=8, ramp_tokens=5)]},
            r"batch_size.shadows\[0\].ramp_size=8 is below batch_size.initial=16",
        ),
        ({"policy": "linear_ramp", "ramp_tokens": 5}, "batch_size.ramp_size=null must be at least"),
        ({"policy": "linear_ramp", "ramp_size": 64}, "batch_size.ramp_tokens=null must be at"),
        (
            {"shadows": [ShadowSettings(), ShadowSettings(theta=0.0)]},
            r"batch_size.shadows\[1\].theta=0.0 must be positive",
        ),
        (
            {"shadows": [ShadowSettings(cap=4)]},
            r"batch_size.shadows\[0\].cap=4 is below batch_size.initial=16",
        ),
        (
            {"shadows": [ShadowSettings(), ShadowSettings()]},
            "more than once; give a shadow another",
        ),
        (
            {"policy": "norm_test", "shadows": [ShadowSettings(name="norm_test")]},
            "the policy norm_test more than once",
        ),
    ],
)
def test_setting_that_breaks_a_rule_is_named_with_a_hint(settings, told):
    with pytest.raises(InputError, match=told):
        BatchSizeSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"price": 0.3}, "price=0.3 must lie between 0 and 0.29"),
        ({"price": 0.0}, "price=0.0 must lie between"),
        ({"policy": "adaptive", "estimate": "nested"}, "is read by batch_size.policy=progress"),
    ],
)
def test_progress_has_a_price_and_a_curve_of_its_own(settings, told):
    with pytest.raises(InputError, match=told):
        BatchSizeSettings(**({"policy": "progress"} | settings))


def test_large_theta_is_allowed():
    assert BatchSizeSettings(policy="adaptive", theta=3.0).theta == 3.0


def test_plan_that_ends_where_the_batch_begins_is_allowed():
    assert BatchSizeSettings("linear_ramp", ramp_size=16, ramp_tokens=5).ramp_size == 16


@pytest.mark.parametrize("kind", [BatchSizeSettings, ShadowSettings])
@pytest.mark.parametrize(
    ("policy", "own"), [("norm_test", ("up", "none", 0.3)), ("adaptive", ("down", "sqrt", 0.6))]
)
def test_policy_has_its_own_values_where_nothing_else_is_said(kind, policy, own):
    settings = kind(policy)
    assert (settings.rounding, settings.lr_scaling, settings.theta) == own
    other = kind(policy, rounding="down", theta=0.5)
    assert (other.rounding, other.lr_scaling, other.theta) == ("down", own[1], 0.5)


def test_shadows_are_told_apart_by_what_they_are():
    labels = [
        ShadowSettings().label,
        ShadowSettings(theta=0.3, geometry="euclidean").label,
        ShadowSettings(target="maximum_efficiency").label,
        ShadowSettings(policy="norm_test", theta=0.1).label,
        ShadowSettings(name="mine").label,
    ]
    assert labels == [
        "adaptive_manhattan_plug_in_theta_0.6",
        "adaptive_euclidean_plug_in_theta_0.3",
        "adaptive_manhattan_plug_in_maximum_efficiency",
        "norm_test_0.1",
        "mine",
    ]


def test_policies_name_the_noise_scale_that_must_be_measured_for_them():
    assert BatchSizeSettings(policy="adaptive", geometry="nuclear").reads == ("nuclear", "plug_in")
    assert BatchSizeSettings(policy="norm_test").reads == ("euclidean", "plug_in")
    assert BatchSizeSettings(policy="staged", stage_tokens=[1], stage_sizes=[32]).reads is None
