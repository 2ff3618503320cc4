"""A run with averaged weights: they are evaluated and saved, and a stop leaves its bits."""

import pytest
import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.launch.train import check_run
from gns_pretrain.model.batch_norm import BatchNorm
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.averaging import AveragingSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.collectives import clip_gradient_norm
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import step as training_step
from gns_pretrain.training.bad_steps import BadStepSettings
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, load_model
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.workloads import open_workload
from tests.runs import ALONE, train_here
from tests.settings import SEQUENCE_LENGTH, small_run, without_times

STEPS = 12
GPA = AveragingSettings("ema", decay=0.8, interpolation=0.7, count_first=True)
RUNS: dict[str, tuple[OptimizerSettings, AveragingSettings]] = {
    "gpa": (MuonSettings(lr=0.05, adamw=AdamWPart(lr=0.02)), GPA),
    "uniform": (AdamWSettings(lr=1e-2), AveragingSettings("uniform", start=0.5)),
    "schedule-free": (
        CustomSettings(class_path="schedulefree.AdamWScheduleFree", lr=0.02),
        AveragingSettings(),
    ),
}


def run_of(folder, data, optimizer, averaging, **changes):
    settings = {
        "steps": STEPS,
        "optimizer": optimizer,
        "averaging": averaging,
        "evaluation": EvaluationSettings(every_tokens=4 * 8 * SEQUENCE_LENGTH, num_sequences=7),
        "noise_scale": NoiseScaleSettings(["manhattan"], every_steps=3),
    }
    return small_run(folder, data, **(settings | changes))


def lines(folder):
    return [without_times(line) for line in read_records(folder / "small" / "metrics.jsonl")]


def validation(folder):
    return [line for line in lines(folder) if line["kind"] == "validation"]


@pytest.mark.parametrize("name", RUNS)
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_lines(name, tmp_path, shards):
    assert train_here(run_of(tmp_path / "whole", shards, *RUNS[name])) == 0
    config = run_of(tmp_path / "stopped", shards, *RUNS[name])
    assert train_here(config, stop_after=7) == 75
    assert train_here(config) == 0
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


@pytest.mark.parametrize("name", RUNS)
def test_what_is_evaluated_is_what_its_checkpoint_holds(name, tmp_path, shards):
    config = run_of(tmp_path, shards, *RUNS[name])
    assert train_here(config) == 0
    assert {line["weights"] for line in validation(tmp_path)} == {"averaged"}
    saved = checkpoint_folders(tmp_path / "small" / "checkpoints")[0]
    workload = open_workload(config)
    workload.begin(ALONE)
    found = workload.evaluate(load_model(saved), chunk=2, world=ALONE)
    assert found.loss == validation(tmp_path)[-1]["loss"]


def test_average_changes_no_line_but_those_of_the_validation(tmp_path, shards):
    for name, averaging in (("plain", AveragingSettings()), ("ema", AveragingSettings("ema", 0.8))):
        assert train_here(run_of(tmp_path / name, shards, AdamWSettings(), averaging)) == 0
    plain, ema = (
        [line for line in lines(tmp_path / name) if line["kind"] != "validation"]
        for name in ("plain", "ema")
    )
    assert {line["kind"] for line in ema} == {"train", "noise"}
    assert ema == plain
    assert "weights" not in validation(tmp_path / "plain")[0]


def test_a_step_that_is_left_out_leaves_the_average(tmp_path, shards, monkeypatch):
    taken = [0]

    def broken_from_the_third(parameters, gradient_clip):
        taken[0] += 1
        if taken[0] > 2:
            parameters[0].grad.fill_(torch.inf)
        return clip_gradient_norm(parameters, gradient_clip)

    monkeypatch.setattr(training_step, "clip_gradient_norm", broken_from_the_third)
    skip = BadStepSettings(skip=True, max_consecutive=STEPS)
    config = run_of(tmp_path, shards, AdamWSettings(lr=1e-2), GPA, bad_steps=skip, steps=8)
    assert train_here(config) == 0
    first, *later = (line["loss"] for line in validation(tmp_path))
    assert len(later) == 2
    assert first != later[0] == later[1]


def test_memory_and_checkpoint_are_counted_with_the_average(tmp_path, shards):
    shown: list[str] = []
    for averaging in (AveragingSettings(), GPA):
        config = run_of(tmp_path, shards, AdamWSettings(), averaging)
        check_run(config, None, show=lambda *found: shown.append("\n".join(map(str, found))))
    # 6,822 parameters of 4 bytes: weights and two moments, and the average.
    assert "a checkpoint takes 81.9 kB" in shown[0]
    assert "a checkpoint takes 109.2 kB" in shown[1]


def test_running_statistics_which_would_be_of_other_weights_are_refused():
    with pytest.raises(InputError, match=r"running statistics .*use averaging=none"):
        GPA.build(AdamWSettings(), nn.Sequential(nn.Linear(3, 2), BatchNorm(2)))
