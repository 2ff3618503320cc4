"""Branches have their source's settings but for the batch, and go on where it stood."""

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.errors import InputError
from gns_pretrain.launch.branches import BranchSettings, branches
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWPart
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.runs.branches import step_of_window
from gns_pretrain.runs.identity import (
    Purpose,
    deciding_settings,
    differing_settings,
    flatten,
    settings_of_run,
)
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.schedule import ScheduleSettings
from tests.runs import train_here
from tests.settings import SEQUENCE_LENGTH, small_run, without_times

STEP_TOKENS = 8 * SEQUENCE_LENGTH
# What a branch sets itself, whatever the source had.
OWN = {
    *("init.from", "init.what", "token_budget", "evaluation.every_tokens", "batch_size.initial"),
    *("schedule.kind", "schedule.warmup_fraction", "noise_scale.geometries", "micro_batch_size"),
    *("optimizer.lr", "optimizer.adamw.lr", "data_fingerprint", "checkpoint.keep"),
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    """Hydra, initialised once."""
    register_configs()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield


def composed(words):
    return settings_from(compose("train", overrides=words), words)


def trained(folder: Path, shards: Path, **changes):
    """A source of 12 steps with checkpoints after 4, 8 and 12."""
    config = small_run(
        folder,
        shards,
        steps=12,
        run_name="source",
        checkpoint=CheckpointSettings(every_steps=4, keep=3),
        **changes,
    )
    assert train_here(config) == 0
    return folder / "source"


def branch_of(source: Path, **settings):
    (words,) = branches(BranchSettings(source=str(source), **settings))
    return words


def test_branch_at_its_sources_own_batch_is_the_source_going_on(tmp_path, shards):
    constant = ScheduleSettings(kind="constant", warmup_fraction=0.25)
    source = trained(tmp_path, shards, schedule=constant)
    # A window that ends where the source has no validation loss, or it would not be trained again.
    words = branch_of(source, steps=[4], factors=[1], window_tokens=7 * STEP_TOKENS)
    more = [f"output_directory={tmp_path}", "launch.device=cpu", "launch.threads=1"]
    config = composed([*words, *more])
    assert train_here(config) == 0
    branch, whole = (
        [
            without_times(line)
            for line in read_records(directory / "metrics.jsonl")
            if line["kind"] == "train" and 4 < line["step"] < 12
        ]
        for directory in (tmp_path / config.run_name, source)
    )
    assert len(branch) == 7
    assert branch == whole


def test_own_batch_is_not_trained_again_where_the_source_has_trained_the_window(tmp_path, shards):
    constant = ScheduleSettings(kind="constant", warmup_fraction=0.25)
    source = trained(tmp_path, shards, schedule=constant)
    # Its last step is validated, step 8 is not; its first three are at a rising rate.
    for steps, window, count in (([4], 8, 1), ([8], 4, 1), ([4], 4, 2)):
        settings = BranchSettings(
            source=str(source), steps=steps, factors=[1, 2], window_tokens=window * STEP_TOKENS
        )
        assert len(branches(settings)) == count
    records = read_records(source / "metrics.jsonl")
    assert step_of_window(records, 0, 12 * STEP_TOKENS) is None
    assert step_of_window(records, 4 * STEP_TOKENS, 8 * STEP_TOKENS)["step"] == 5


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        (SignumSettings(lr=1e-2, momentum=0.8), {"optimizer.lr": 1e-2}),
        (
            MuonSettings(lr=4e-2, momentum=0.9, adamw=AdamWPart(lr=2e-3, beta2=0.9)),
            {"optimizer.lr": 4e-2, "optimizer.adamw.lr": 2e-3},
        ),
    ],
)
def test_branch_has_its_sources_settings_and_rates_of_its_batch(optimizer, rates, tmp_path, shards):
    source = trained(
        tmp_path,
        shards,
        optimizer=optimizer,
        gradient_clip=None,
        seed=3,
        noise_scale=NoiseScaleSettings(geometries=["manhattan"], every_steps=4),
    )
    words = branch_of(source, steps=[8], factors=[4], window_tokens=1, lr_scaling=["linear"])
    config = composed([*words, f"output_directory={tmp_path}"])
    own, theirs = flatten(asdict(config)), settings_of_run(source)
    differing = differing_settings(
        deciding_settings(own, Purpose.CURVE), deciding_settings(theirs, Purpose.CURVE)
    )
    assert set(differing) <= OWN
    assert config.seed == 3
    assert (config.batch_size.initial, config.micro_batch_size) == (32, 2)
    assert config.token_budget == 8 * STEP_TOKENS + 4 * STEP_TOKENS  # a whole step of the largest
    # The cosine of 12 steps with 1 of warm-up, at virtual step 9 of 2 .. 12; the batch is 4 times.
    (at_peak,) = {
        line["lr"]
        for line in read_records(source / "metrics.jsonl")
        if line["kind"] == "train" and line["step"] == 9
    }
    for name, peak in rates.items():
        assert own[name] == pytest.approx(4 * at_peak / optimizer.lr * peak, rel=1e-12)


def test_several_scalings_train_the_sources_own_batch_once(tmp_path, shards):
    source = trained(tmp_path, shards)
    found = branches(
        BranchSettings(
            source=str(source), steps=[4], factors=[0.5, 1, 2], lr_scaling=["sqrt", "none"]
        )
    )
    names = [word for words in found for word in words if word.startswith("run_name=")]
    assert names == [
        *("run_name=source-at4-batch4-sqrt", "run_name=source-at4-batch4-none"),
        "run_name=source-at4-batch8-sqrt",
        *("run_name=source-at4-batch16-sqrt", "run_name=source-at4-batch16-none"),
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"source": None}, "hydra.sweeper.source has no value"),
        ({"source": "nowhere"}, "hydra.sweeper.source=nowhere is not a run directory"),
        ({"steps": [5]}, r"hydra.sweeper.steps=\[5\]: .*no checkpoint of step 5; it has 4, 8, 12"),
        ({"steps": [4], "factors": [0.3]}, r"hydra.sweeper.factors: 0.3 times the batch"),
        ({"steps": [12]}, "learning rate has come to zero"),
    ],
)
def test_what_cannot_be_branched_is_refused_in_one_line(settings, named, cosine_source):
    with pytest.raises(InputError, match=named):
        branches(BranchSettings(**({"source": str(cosine_source)} | settings)))


@pytest.fixture(scope="module")
def cosine_source(tmp_path_factory, shards):
    return trained(tmp_path_factory.mktemp("cosine"), shards)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"factors": [0.0]}, "hydra.sweeper.factors"),
        ({"lr_scaling": ["cubic"]}, "hydra.sweeper.lr_scaling"),
        ({"window_tokens": 0}, "hydra.sweeper.window_tokens=0"),
    ],
)
def test_settings_are_checked(values, named):
    with pytest.raises(InputError, match=named):
        BranchSettings(**values)
