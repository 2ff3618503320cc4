"""Bad steps leave weights and optimizer state as they are, alike on every rank, up to a limit."""

import math

import pytest
import torch

from gns_pretrain.errors import DivergedError, InputError
from gns_pretrain.launch.train import launch
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import step as training_step
from gns_pretrain.training.bad_steps import BadSteps, BadStepSettings
from tests.runs import ALONE, train_here
from tests.settings import small_run, without_times

SKIP = BadStepSettings(skip=True, norm_factor=4.0, window=4, max_consecutive=2)


def reasons(bad_steps, norms, loss=1.0):
    return [bad_steps.reason(torch.tensor(loss), torch.tensor(norm)) for norm in norms]


def test_a_norm_is_compared_with_the_median_of_good_steps_once_half_a_window_is_known():
    bad_steps = BadSteps(SKIP, ALONE)
    assert reasons(bad_steps, [50.0, 1.0]) == [None, None]  # 50 comes before there is a median
    too_large = "the gradient norm 103 is above bad_steps.norm_factor=4 times the usual 25.5"
    assert reasons(bad_steps, [103.0, 101.0]) == [too_large, None]
    # 103 has not entered the window: the median of 50, 1, 101 is 50.
    assert reasons(bad_steps, [199.0, 201.0])[0] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_bad_and_the_limit_counts_steps_in_a_row(value):
    bad_steps = BadSteps(SKIP, ALONE)
    why = f"the gradient norm is {value}, not finite"
    assert reasons(bad_steps, [value, 1.0, value, value]) == [why, None, why, why]
    bad_steps.raise_beyond_limit(4, why)
    assert reasons(bad_steps, [1.0], loss=value) == [f"the loss is {value}, not finite"]
    with pytest.raises(DivergedError, match=r"step 5: the loss .*2 steps before it, .*max_cons"):
        bad_steps.raise_beyond_limit(5, f"the loss is {value}, not finite")


def test_a_norm_rule_without_skipping_is_refused():
    with pytest.raises(InputError, match=r"norm_factor=3.0 is read by bad_steps.skip=true alone"):
        BadStepSettings(norm_factor=3.0)


def scale_gradients(monkeypatch, factors, *, done=0):
    """Multiply the gradients of some steps, before their norm is taken."""
    clip = training_step.clip_gradient_norm
    taken = [done]

    def scaled(parameters, gradient_clip):
        taken[0] += 1
        for parameter in parameters:
            parameter.grad.mul_(factors.get(taken[0], 1.0))
        return clip(parameters, gradient_clip)

    monkeypatch.setattr(training_step, "clip_gradient_norm", scaled)


def lines_of(folder):
    return [without_times(line) for line in read_records(folder / "small" / "metrics.jsonl")]


@pytest.mark.parametrize("later", [0, 6])  # read in the bad step 7: step 1
def test_a_run_skips_bad_steps_records_them_and_resumes_exactly(
    later, tmp_path, shards, monkeypatch
):
    bad = {7: math.nan, 13: 50.0, 14: math.inf}
    measured = NoiseScaleSettings(["manhattan"], every_steps=7, read_after_steps=later)
    changes = {"bad_steps": SKIP, "noise_scale": measured, "steps": 16}
    with monkeypatch.context() as patch:
        scale_gradients(patch, bad)
        assert train_here(small_run(tmp_path / "whole", shards, **changes)) == 0
    whole = lines_of(tmp_path / "whole")
    train = {line["step"]: line for line in whole if line["kind"] == "train"}
    assert [step for step, line in train.items() if "skipped" in line] == [7, 13, 14]
    assert train[7]["grad_norm"] is None  # JSON has no NaN
    assert "norm_factor=4" in train[13]["skipped"]
    # What a skipped step measured (7, 14) enters no average.
    assert [line["step"] for line in whole if line["kind"] == "noise"] == [1]
    assert all(math.isfinite(line["loss"]) for line in train.values())

    for done, stop_after in ((0, 13), (13, None)):  # between two bad steps in a row
        with monkeypatch.context() as patch:
            scale_gradients(patch, bad, done=done)
            code = train_here(small_run(tmp_path / "cut", shards, **changes), stop_after=stop_after)
        assert code == (75 if stop_after else 0)
    assert lines_of(tmp_path / "cut") == whole


def test_a_skipped_step_changes_no_weight(tmp_path, shards, monkeypatch):
    """The loss of a step is that of the weights before it: with every later step bad, it stays."""
    scale_gradients(monkeypatch, dict.fromkeys(range(3, 13), math.nan))
    skip = BadStepSettings(skip=True, max_consecutive=10)
    config = small_run(tmp_path, shards, steps=12, bad_steps=skip)
    config.evaluation.every_tokens = 128  # every step
    assert train_here(config) == 0
    losses = [line["loss"] for line in lines_of(tmp_path) if line["kind"] == "validation"]
    assert losses[0] != losses[1]
    assert len(set(losses[1:])) == 1


def test_a_run_that_a_bad_step_has_ended_goes_on_with_skipping(
    tmp_path, shards, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        scale_gradients(patch, {8: math.nan})
        assert launch(small_run(tmp_path, shards, steps=12)) == 3
    assert "step 8: the gradient norm is nan" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        scale_gradients(patch, {8: math.nan}, done=5)
        assert train_here(small_run(tmp_path, shards, steps=12, bad_steps=SKIP)) == 0
    train = [line for line in lines_of(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["step"] for line in train if "skipped" in line] == [8]


def test_more_bad_steps_in_a_row_than_allowed_end_the_run(tmp_path, shards, monkeypatch, capsys):
    scale_gradients(monkeypatch, dict.fromkeys((6, 7, 8), math.nan))
    assert launch(small_run(tmp_path, shards, steps=12, bad_steps=SKIP)) == 3
    error = capsys.readouterr().err
    assert "step 8: the gradient norm is nan, not finite, as in 2 steps before it" in error
    train = [line["step"] for line in lines_of(tmp_path) if line["kind"] == "train"]
    assert train == [1, 2, 3, 4, 5, 6, 7, 8]


def test_ranks_decide_by_one_sum(monkeypatch):
    """Whatever a rank itself sees, all of them compare the same numbers."""
    world = World(rank=0, num_ranks=2, device=torch.device("cpu"), kind="fsdp")

    def with_another_rank(values, _):
        return values + torch.tensor([math.nan, 1.0])

    monkeypatch.setattr("gns_pretrain.training.bad_steps.sum_over_ranks", with_another_rank)
    assert reasons(BadSteps(SKIP, world), [1.0]) == ["the loss is nan, not finite"]
