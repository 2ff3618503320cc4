"""The batch size's settings against ranks and measurements, its YAML files, and its record."""

import io
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from gns_pretrain.batch_size.policies import Adaptive
from gns_pretrain.batch_size.settings import BatchSizeSettings, ShadowSettings
from gns_pretrain.config.checks import check_batch_size, check_layout
from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import register_configs
from gns_pretrain.errors import InputError
from gns_pretrain.launch.build import build_adaptive_batch_size
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.tracking.console import ConsoleView
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.tracking.views import axes, series
from tests.settings import planned, small_run

CONF = Path(__file__).parents[3] / "gns_pretrain" / "conf"
MEASURED = NoiseScaleSettings(geometries=["manhattan"], min_samples=4)


def config(*, noise_scale=MEASURED, micro_batch_size=2, **settings):
    return small_run(
        Path("outputs"),
        Path("data"),
        micro_batch_size=micro_batch_size,
        noise_scale=noise_scale,
        batch_size=BatchSizeSettings(**({"initial": 8, "policy": "adaptive"} | settings)),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"initial": 9}, "batch_size.initial=9 .*batch_size.initial=8 or batch_size.initial=10"),
        ({"cap": 11}, "batch_size.cap=11 .*batch_size.cap=10 or batch_size.cap=12"),
        ({"initial": 6}, "at least noise_scale.min_samples=4 .* or micro_batch_size=1"),
        ({"micro_batch_max": 1}, "batch_size.micro_batch_max=1 is below micro_batch_size=2"),
        ({"noise_scale": NoiseScaleSettings()}, r"geometries=\[\] .*geometries=\[manhattan\]"),
        (
            {"estimate": "cross_fitted"},
            r"estimates=\[plug_in\] .*estimates=\[plug_in,cross_fitted\]",
        ),
        ({"policy": "norm_test"}, r"reads the euclidean plug_in .*=\[manhattan,euclidean\]"),
        (
            {"policy": "staged", "stage_tokens": [9], "stage_sizes": [11]},
            "batch_size.stage_sizes=11 .*stage_sizes=10 or",
        ),
        ({"policy": "linear_ramp", "ramp_size": 11, "ramp_tokens": 9}, "batch_size.ramp_size=11"),
        (
            {"policy": "constant", "shadows": [ShadowSettings(geometry="nuclear")]},
            r"batch_size.shadows\[0\].policy=adaptive reads the nuclear plug_in",
        ),
        (
            {"policy": "constant", "shadows": [ShadowSettings(cap=11)]},
            r"batch_size.shadows\[0\].cap=11",
        ),
    ],
)
def test_batch_size_that_does_not_fit_ranks_or_measurements_is_refused(changes, told):
    with pytest.raises(InputError, match=told):
        check_batch_size(config(**changes), num_ranks=1)


def test_more_ranks_have_more_samples():
    with pytest.raises(InputError, match="min_samples=4"):
        check_batch_size(config(initial=4), num_ranks=1)
    check_batch_size(config(initial=8), num_ranks=4)


def test_constant_batch_needs_no_samples_and_keeps_its_micro_batch():
    run = config(policy="constant", initial=4, micro_batch_max=4)
    check_batch_size(run, num_ranks=1)
    adaptive = build_adaptive_batch_size(run, planned(run), num_ranks=1)
    assert adaptive.followed.sizes.at_least(4).micro_batch_size == 2


@pytest.mark.parametrize("setting", [{"every_steps": 0}, {"min_samples": 1}])
def test_measurement_interval_and_samples_have_their_least(setting):
    with pytest.raises(InputError, match=f"noise_scale.{next(iter(setting))}=. must be at least"):
        NoiseScaleSettings(**setting)


# YAML files


def composed(*words):
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings_from(compose("train", [*words, "data.path=data"]), words)


@pytest.mark.parametrize("policy", sorted(path.stem for path in (CONF / "batch_size").glob("*")))
def test_every_policy_composes_into_a_run_that_may_start(policy):
    measured = dict.fromkeys(("adaptive", "goodput", "progress"), "manhattan")
    measured["norm_test"] = "euclidean"
    estimates = "[nested]" if policy == "progress" else "[plug_in]"
    run = composed(
        f"batch_size={policy}",
        f"noise_scale={measured.get(policy, 'none')}",
        f"noise_scale.estimates={estimates}",
        "micro_batch_size=2",
    )
    check_layout(run, num_ranks=1, ranks_per_node=1)
    check_batch_size(run, num_ranks=1)
    assert run.batch_size.policy == policy
    assert build_adaptive_batch_size(run, planned(run), num_ranks=1).followed.policy.name == policy


def test_initial_size_of_the_default_run_stands_whatever_the_policy():
    initial = composed().batch_size.initial
    assert composed("batch_size=adaptive").batch_size.initial == initial
    assert composed("batch_size=adaptive", "batch_size.initial=48").batch_size.initial == 48


def test_shadows_are_a_list_on_the_command_line():
    run = composed("batch_size.shadows=[{theta: 0.5}, {policy: norm_test, theta: 0.2, name: mine}]")
    assert [shadow.label for shadow in run.batch_size.shadows] == [
        "adaptive_manhattan_plug_in_theta_0.5",
        "mine",
    ]


def test_shadow_of_the_norm_test_is_the_policy_that_its_file_follows():
    followed = composed("batch_size=norm_test").batch_size
    (shadow,) = composed("batch_size.shadows=[{policy: norm_test}]").batch_size.shadows
    assert (followed.rounding, followed.lr_scaling, followed.theta) == ("up", "none", 0.3)
    for name in ("policy", "rounding", "lr_scaling", "theta", "decide_every_steps", "cap"):
        assert getattr(shadow, name) == getattr(followed, name)


def test_resolved_values_are_what_an_earlier_runs_file_holds():
    for words, held in (
        (["batch_size=norm_test"], {"rounding": "up", "lr_scaling": "none", "theta": 0.3}),
        (["batch_size=staged"], {"rounding": "down", "lr_scaling": "sqrt", "theta": 0.6}),
        ([], {"rounding": "down", "lr_scaling": "sqrt", "theta": 0.6}),
    ):
        written = asdict(composed(*words))["batch_size"]
        assert {name: written[name] for name in held} == held


# What theta means


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"theta": 0.6}, "is below 1.253: .* can grow from noise alone; .*cross_fitted"),
        ({"theta": 1.3}, "cannot grow from noise alone"),
        ({"theta": 1.3}, f"below theta = {math.sqrt(math.pi / 2):.3f}"),
        ({"theta": 1.1, "geometry": "euclidean"}, "below theta = 1.000"),
        # The small-sample factor mends the noise alone; the signal is the plug-in one.
        ({"theta": 0.6, "estimate": "debiased"}, "can grow from noise alone"),
        (
            {"theta": 3.0, "estimate": "cross_fitted"},
            "past Algorithm 1's .0, 1., as a cross_fitted",
        ),
    ],
)
def test_note_on_theta_names_the_threshold(settings, told):
    note = Adaptive.note(BatchSizeSettings(policy="adaptive", **settings))
    assert note.startswith(f"theta={settings['theta']:g}")
    assert re.search(told, note), note


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "constant"},
        {"policy": "adaptive", "target": "kappa"},
        {"policy": "adaptive", "theta": 0.6, "estimate": "cross_fitted"},
    ],
)
def test_where_no_theta_grows_from_noise_nothing_is_noted(settings):
    policy = BatchSizeSettings(**settings)
    assert policy.kind.note(policy) is None


# Record


SHADOW = {
    "kind": "shadow",
    "step": 3700,
    "policy": "mine",
    "from": 64,
    "to": 96,
    "target": 118.9,
    "lr_multiplier": 1.2247,
}


def test_shadow_is_a_series_of_its_own_and_not_on_the_console():
    assert axes(SHADOW) == {"trainer/step": 3700}
    assert series(SHADOW) == {
        "shadow/mine/from": 64,
        "shadow/mine/to": 96,
        "shadow/mine/target": 118.9,
        "shadow/mine/lr_multiplier": 1.2247,
    }
    text = io.StringIO()
    view = ConsoleView(
        MetricsSettings(progress="never"),
        budget=1,
        run_directory=Path(),
        console=Console(file=text),
    )
    view.write(SHADOW)
    view.write(SHADOW | {"kind": "batch_size"})
    assert text.getvalue().startswith("batch size 64 -> 96 at step 3,700")
    assert text.getvalue().count("\n") == 1
