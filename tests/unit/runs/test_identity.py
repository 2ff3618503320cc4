"""Which settings make two runs the same: the cases of the table in identity.py."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from gns_pretrain.batch_size.settings import BatchSizeSettings, ShadowSettings
from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.errors import InputError
from gns_pretrain.runs.history import write_provenance
from gns_pretrain.runs.identity import (
    BEFORE_ADDED,
    FINGERPRINT,
    Purpose,
    changes_run_name,
    decides,
    deciding_settings,
    differing_settings,
    flatten,
    identifying_settings,
    refuse_another_run,
    settings_of_run,
)

RESUME, RECORD, CURVE = Purpose.RESUME, Purpose.RECORD, Purpose.CURVE
ALL, NONE = {RESUME, RECORD, CURVE}, set()


def run(*, policy: str = "constant", measured: bool = False, **changes: Any) -> dict[str, Any]:
    """A run's settings; `__` in a name of `changes` stands for the dot."""
    settings = {
        "run_name": "a",
        "table": "table2",
        "cell": "adamw_small",
        "seed": 0,
        "micro_batch_size": 4,
        "model.dim": 8,
        "model.activation_checkpointing": False,
        "data.path": "data/c4",
        "data.sequence_length": 16,
        "scale.name": "demo",
        "noise_scale.geometries": ["manhattan"] if measured else [],
        "noise_scale.every_steps": 100,
        "batch_size.policy": policy,
        "batch_size.initial": 64,
        "batch_size.theta": 0.6,
        "batch_size.micro_batch_max": 8,
        "batch_size.shadows": [],
        FINGERPRINT: "c4",
    }
    return settings | {name.replace("__", "."): value for name, value in changes.items()}


def same_for(one: dict[str, Any], other: dict[str, Any]) -> set[Purpose]:
    """The purposes for which two runs are the same."""
    return {p for p in Purpose if deciding_settings(one, p) == deciding_settings(other, p)}


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("policy", ["constant", "adaptive"])
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"run_name": "b"}, {RECORD, CURVE}),
        ({"table": "table8", "cell": "constant_small"}, {RECORD, CURVE}),
        ({"seed": 1}, {CURVE}),
        ({"model__dim": 16}, NONE),
        ({"model__activation_checkpointing": True}, ALL),
        ({"launch__nproc_per_node": 8}, ALL),
        ({"parallel__kind": "ddp"}, ALL),
        ({"data__path": "/scratch/c4"}, ALL),
        ({FINGERPRINT: "other data"}, NONE),
        ({"data__sequence_length": 32}, NONE),
        ({"scale__name": "paper"}, ALL),
        ({"batch_size__initial": 128}, NONE),
        ({"batch_size__shadows": [{"policy": "norm_test"}]}, {CURVE}),
        ({"bad_steps__skip": True}, {RESUME}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_counts_in_every_run(change, same, policy, measured):
    one = run(policy=policy, measured=measured)
    assert same_for(one, run(policy=policy, measured=measured, **change)) == same


@pytest.mark.parametrize(
    ("policy", "measured", "change", "same"),
    [
        # A constant batch does not read what chooses a batch.
        ("constant", False, {"batch_size__theta": 0.5}, {RECORD, CURVE}),
        ("constant", True, {"batch_size__theta": 0.5}, {RECORD, CURVE}),
        ("adaptive", True, {"batch_size__theta": 0.5}, NONE),
        # Micro-batches are the samples of a measurement, and how sizes are split.
        ("constant", False, {"micro_batch_size": 8}, ALL),
        ("constant", True, {"micro_batch_size": 8}, {RESUME, CURVE}),
        ("adaptive", True, {"micro_batch_size": 8}, {RESUME}),
        ("linear_ramp", False, {"micro_batch_size": 8}, {RESUME}),
        ("constant", False, {"batch_size__micro_batch_max": 16}, ALL),
        ("adaptive", True, {"batch_size__micro_batch_max": 16}, {RESUME}),
        # So does when readings come.
        ("constant", True, {"noise_scale__read_after_steps": 8}, {RESUME, CURVE}),
        ("adaptive", True, {"noise_scale__read_after_steps": 8}, {RESUME}),
        # How something is measured counts where it is.
        ("constant", False, {"noise_scale__every_steps": 10}, {RECORD, CURVE}),
        ("constant", True, {"noise_scale__every_steps": 10}, {CURVE}),
        ("adaptive", True, {"noise_scale__every_steps": 10}, NONE),
    ],
)
def test_what_counts_by_policy_and_measurement(policy, measured, change, same):
    one = run(policy=policy, measured=measured)
    assert same_for(one, run(policy=policy, measured=measured, **change)) == same


def test_measured_constant_run_has_the_curve_of_an_unmeasured_one_and_another_record():
    measured, unmeasured = run(measured=True), run()
    assert same_for(measured, unmeasured) == {CURVE}


def test_data_without_a_known_fingerprint_is_not_the_same_data():
    unknown = run()
    del unknown[FINGERPRINT]
    assert same_for(run(), unknown) == NONE


def test_a_run_older_than_a_setting_has_the_value_that_it_was_trained_with(tmp_path):
    write_provenance(tmp_path, "seed: 0\nmodel:\n  dim: 8\n", "c4")
    known = settings_of_run(tmp_path)
    assert known["bad_steps.skip"] is False
    now = {"seed": 0, "model": {"dim": 8}, "bad_steps": {"skip": False}}
    assert same_for(known, known | identifying_settings(now, "c4")) == ALL
    now["bad_steps"]["skip"] = True
    assert same_for(known, known | identifying_settings(now, "c4")) == {RESUME}


def test_growth_of_the_micro_batch_may_change_on_resume_and_the_policy_not():
    growing = run(policy="adaptive", measured=True)
    kept = deciding_settings(growing, RESUME)
    assert "batch_size.micro_batch_max" not in kept
    assert {"batch_size.theta", "batch_size.policy"} <= kept.keys()


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("optimizer", "constant", True),
        ("optimizer.lr", "constant", True),
        ("micro_batch_size", "constant", False),
        ("micro_batch_size", "adaptive", True),
        ("launch.nproc_per_node", "adaptive", False),
        ("parallel", "adaptive", False),
        ("evaluation.every_tokens", "constant", False),
        ("evaluation.num_sequences", "constant", True),
        ("bad_steps.skip", "constant", False),
        ("data.path", "constant", True),
        ("data.stage_to", "constant", False),
    ],
)
def test_run_name_holds_overrides_that_make_another_run(name, policy, expected):
    assert changes_run_name(name, policy=policy) is expected


def identity(dim: int = 8, *, data: str = "first", ranks: int = 1) -> dict[str, Any]:
    return identifying_settings(
        {"seed": 0, "model": {"dim": dim}, "launch": {"nproc_per_node": ranks}}, data
    )


@pytest.fixture
def directory(tmp_path) -> Path:
    """Of a run that was started with `identity()`."""
    text = "seed: 0\nmodel:\n  dim: 8\nlaunch:\n  nproc_per_node: 1\n"
    write_provenance(tmp_path, text, "first")
    return tmp_path


def test_equal_start_and_one_on_other_ranks_may_resume(directory):
    refuse_another_run(directory, identity())
    refuse_another_run(directory, identity(ranks=4))


def test_changed_model_under_the_same_name_is_refused_and_named(directory):
    with pytest.raises(InputError, match=r"model.dim was 8 and is now 16; use another run_name"):
        refuse_another_run(directory, identity(dim=16))


def test_changed_data_under_the_same_path_is_refused(directory):
    with pytest.raises(InputError, match=r"other data: .* fingerprint second, the run's had"):
        refuse_another_run(directory, identity(data="second"))


@pytest.mark.parametrize("text", ["", '{"data_finger', "[]", "{}"])
def test_damaged_record_of_a_run_is_named(text, directory):
    (directory / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json .*; restore it"):
        refuse_another_run(directory, identity())


@pytest.mark.parametrize("text", ["model: [", "- 1", "\0", ""])
def test_damaged_settings_of_a_run_are_named(text, directory):
    (directory / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml is damaged \(.*\); restore it, or use"):
        refuse_another_run(directory, identity())


def test_old_run_by_the_first_versions_inflection_resumes_by_that_name_alone(tmp_path):
    text = "batch_size:\n  target: inflection\n  shadows:\n  - target: inflection\n"
    write_provenance(tmp_path, text, "first")

    def resume(target: str) -> None:
        settings = BatchSizeSettings(target=target, shadows=[ShadowSettings(target=target)])
        both = {"target": settings.target, "shadows": [{"target": settings.shadows[0].target}]}
        refuse_another_run(tmp_path, identifying_settings({"batch_size": both}, "first"))

    resume("inflection_v1")
    told = "batch_size.target was inflection_v1 and is now corrected_inflection"
    for target in ("inflection", "corrected_inflection"):
        with pytest.raises(InputError, match=told):
            resume(target)


def test_directory_without_a_run_refuses_nothing(tmp_path):
    refuse_another_run(tmp_path / "new", identity())


def test_flatten_names_nested_settings_by_dots_and_keeps_lists():
    assert flatten({"a": {"b": {"c": 1}, "d": [{"e": 2}]}}) == {"a.b.c": 1, "a.d": [{"e": 2}]}


@pytest.mark.parametrize(
    ("recorded", "typed", "then"),
    [
        ("tie_to_tokens: true", [], [0.0, 1.0]),  # older than the bounds
        ("{tie_to_tokens: true, tied_beta2: [0.9, 0.9999]}", [], [0.9, 0.9999]),
        ("tie_to_tokens: true", ["resume=never"], [0.9, 0.9999]),
        ("tie_to_tokens: true", ["optimizer.tied_beta2=[0.5,1]"], [0.5, 1.0]),  # and is refused
    ],
)
def test_run_that_was_tied_to_tokens_without_bounds_goes_on_so(recorded, typed, then, tmp_path):
    text = recorded if recorded.startswith("{") else f"{{{recorded}}}"
    write_provenance(tmp_path / "old", f"optimizer: {text}\n", "first")
    words = [f"output_directory={tmp_path}", "run_name=old", "optimizer.tie_to_tokens=true", *typed]
    register_configs()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        now = settings_from(compose("train", words), words)
    assert now.optimizer.tied_beta2 == then
    name = "optimizer.tied_beta2"
    known, flat = settings_of_run(tmp_path / "old"), flatten(asdict(now))
    assert (known[name] == flat[name]) == ("resume=never" not in typed and then[0] != 0.5)
    assert decides(name, flat, Purpose.RESUME)
    assert not decides(name, flat | {"optimizer.tie_to_tokens": False}, Purpose.CURVE)


def test_run_of_an_older_version_resumes_under_its_command():
    # Its config.yaml: a setting that is new since then stands in BEFORE_ADDED, as it was before.
    old = yaml.safe_load((Path(__file__).parent / "old_run.yaml").read_text())
    words = [
        *("model=tiny", "model.dim=32", "model.num_layers=1", "model.num_heads=2"),
        *("model.num_kv_heads=1", "model.ffn_dim=32", "data.sequence_length=32"),
        *("token_budget=10240", "micro_batch_size=2", "batch_size=adaptive"),
        *("noise_scale=manhattan", "noise_scale.every_steps=3", "batch_size.decide_every_steps=2"),
        *("batch_size.warmup_fraction=0.1", "schedule.warmup_fraction=0.1"),
        *("checkpoint.every_steps=5", "checkpoint.keep=9", "evaluation.every_tokens=2000"),
        *("launch.threads=1", "run_name=old"),
    ]
    register_configs()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        now = flatten(asdict(settings_from(compose("train", words), words)))
    differing = differing_settings(BEFORE_ADDED | flatten(old), now)
    assert [name for name in differing if decides(name, now, Purpose.RESUME)] == []
