"""The critical batch by three definitions, from curves whose answer is known."""

import json
import math
from functools import partial

import pytest
import yaml

from gns_pretrain.errors import InputError
from gns_pretrain.results.critical_batch import (
    FORMATS,
    batch_of_overhead,
    critical_batches,
    draw,
    fit_of_steps,
    largest_within,
    steps_to,
)
from gns_pretrain.results.frame import runs_of_folders
from tests.unit.run_records import nested

S_MIN, E_MIN = 40.0, 1280.0  # steps and sequences: a critical batch of 32
SIZES = (4, 8, 16, 32, 64, 128)
HYPERBOLA = {size: S_MIN + E_MIN / size for size in SIZES}


def test_fit_finds_the_hyperbola_that_made_the_steps():
    assert fit_of_steps(HYPERBOLA) == pytest.approx((S_MIN, E_MIN), rel=1e-9)
    assert fit_of_steps({8: 100.0, 16: 50.0}) is None  # two points fit anything
    # Steps that fall faster than 1 / B have no bend within these batches.
    assert fit_of_steps({8: 100.0, 16: 45.0, 32: 20.0}) is None


def test_overhead_is_where_tokens_exceed_the_least_by_a_fifth():
    # E(B) = 1280 + 40 B exceeds 1.2 E(4) = 1728 at B = 11.2; between 8 and 16 linear in log B.
    share = (1728 - 1600) / (1920 - 1600)
    assert batch_of_overhead(HYPERBOLA) == pytest.approx(8 * 2**share)
    assert batch_of_overhead({8: 100.0, 16: 50.0}) is None
    # A batch too small for its rate may cost more than a larger one: what is above the best counts.
    share = (1.2 * 800 - 800) / (1120 - 800)
    assert batch_of_overhead({4: 300.0, 8: 100.0, 16: 70.0}) == pytest.approx(8 * 2**share)


def test_largest_batch_within_the_tolerance_of_the_best():
    losses = {4: 3.02, 8: 3.0, 16: 3.009, 32: 3.05}
    assert largest_within(losses, 0.01) == 16
    assert largest_within(losses, 0.0) == 8
    assert largest_within(losses, 0.1) == 32


def test_steps_to_a_loss_lie_between_the_evaluations_around_it():
    curve = [(10, 100, 4.0), (20, 200, 3.0), (30, 300, 2.9)]
    assert steps_to(curve, 4.5) == 10
    assert steps_to(curve, 3.25) == pytest.approx(17.5)
    assert steps_to(curve, 2.9) == 30
    assert steps_to(curve, 2.0) is None


def write_branch(folder, size, *, seed, loss, source, lr=0.1, scaling="sqrt", window=1280):
    """Of sequences of one token, from step 50 and 400 tokens of its source."""
    directory = folder / f"{source.name}-at50-batch{size}-{scaling}"
    directory.mkdir()
    settings = nested(
        {
            "table": "critical_batch",
            "cell": scaling,
            "seed": seed,
            "init.from": str(source / "checkpoints" / "step_00000050"),
            "batch_size.policy": "constant",
            "batch_size.initial": size,
            "optimizer.lr": lr,
            "optimizer.name": "signum",
            "data.sequence_length": 1,
            "token_budget": 400 + window,
        }
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = []
    for number in range(1, window // size + 1):
        place = {"step": 50 + number, "tokens": 400 + number * size}
        lines.append({"kind": "train", **place, "loss": 9.0, "lr": lr, "batch_size": size})
        lines.append({"kind": "validation", **place, "loss": loss(number)})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    summary = {"state": "finished", "steps": 50 + window // size}
    (directory / "summary.json").write_text(json.dumps(summary))


def write_source(folder, seed, noise):
    """At a batch of 8 and a rate of 0.05; its last step is not a branch's own window."""
    source = folder / f"source-seed{seed}"
    source.mkdir()
    measured = {"geometry": "manhattan", "estimate": "plug_in", "noise_scale_ema": noise}
    lines = [
        {"kind": "noise", "step": 40, **measured},
        {"kind": "noise", "step": 40, **measured, "estimate": "cross_fitted"},
        {"kind": "train", "step": 50, "tokens": 400, "batch_size": 8, "lr": 0.05},
        {"kind": "noise", "step": 60, **measured | {"noise_scale_ema": 999.0}},
    ]
    (source / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (source / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))
    return source


def falling(step, *, start, steps_a_nat):
    return start - step / steps_a_nat


@pytest.fixture
def outputs(tmp_path):
    """Two seeds whose loss after n steps of B is 5 - n / (40 + 1280 / B), their seeds 0.004 apart.

    The hyperbola of every target: S = (5 - target) (40 + 1280 / B).
    """
    for seed in (0, 1):
        source = write_source(tmp_path, seed, noise=20.0 + 4.0 * seed)
        for size in SIZES:
            loss = partial(falling, start=5.0 + 0.004 * seed, steps_a_nat=HYPERBOLA[size])
            write_branch(tmp_path, size, seed=seed, loss=loss, source=source)
        # Another scaling of the rate, which is worse: it does not count.
        write_branch(
            tmp_path, 16, seed=seed, loss=lambda n: 6.0, source=source, lr=0.9, scaling="none"
        )
    return tmp_path


def test_point_is_read_over_seeds_at_the_better_rate_of_each_batch(outputs):
    (found,) = critical_batches(runs_of_folders([outputs])[0], tolerance=0.01)
    assert (found.source, found.tokens, found.window) == ("source", 400, 1280)
    assert found.batch_size == 8
    assert [branch.batch_size for branch in found.branches] == list(SIZES)
    assert {branch.lr for branch in found.branches} == {0.1}
    for branch in found.branches:
        steps = 1280 // branch.batch_size
        assert branch.steps == steps
        assert branch.loss == pytest.approx(5.002 - steps / HYPERBOLA[branch.batch_size])
        # Two seeds d apart: their standard deviation is d / sqrt(2), its error d / 2.
        assert branch.standard_error == pytest.approx(0.002)
    assert found.noise_scales == dict.fromkeys(
        ("manhattan/cross_fitted", "manhattan/plug_in"), 22.0
    )
    assert found.by_fit == pytest.approx(E_MIN / S_MIN, rel=1e-6)
    assert found.by_tolerance == 4
    assert "only the smallest batch" in found.notes[-1]


def test_steps_too_few_to_tell_do_not_count_and_are_said(outputs):
    (found,) = critical_batches(runs_of_folders([outputs])[0], tolerance=0.01)
    assert not any("does not count" in note for note in found.notes)  # 128 takes ten steps
    source = outputs / "source-seed0"
    write_branch(outputs, 256, seed=0, loss=lambda n: 0.1, source=source)
    (found,) = critical_batches(runs_of_folders([outputs])[0], tolerance=0.01)
    assert found.by_tolerance == 4
    assert "B = 256 took 5 steps, fewer than 8, and does not count" in found.notes[0]


def test_source_stands_for_the_branch_at_its_own_batch(outputs):
    source = outputs / "source-seed0"
    with (source / "metrics.jsonl").open("a") as file:
        for step in range(51, 211):
            place = {"step": step, "tokens": 8 * step, "lr": 0.05}
            file.write(json.dumps({"kind": "train", **place, "batch_size": 8}) + "\n")
        file.write(json.dumps({"kind": "validation", **place, "loss": 1.5}) + "\n")
    (found,) = critical_batches(runs_of_folders([outputs])[0], tolerance=0.01)
    (own,) = (branch for branch in found.branches if branch.batch_size == 8)
    assert (own.loss, own.lr, own.steps) == (1.5, 0.05, 160)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_batches_definitions_and_noise_scales(name, outputs):
    text = FORMATS[name](critical_batches(runs_of_folders([outputs])[0], tolerance=0.01))
    for part in ("128", "manhattan/plug_in", "22", "source", "only the smallest"):
        assert part in text
    if name == "json":
        assert json.loads(text)[0]["by_fit"] == pytest.approx(32.0, rel=1e-6)


def test_figure_is_drawn(outputs, tmp_path):
    found = critical_batches(runs_of_folders([outputs])[0], tolerance=0.01)
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_folder_without_branches_is_refused(tmp_path):
    write_source(tmp_path, 0, noise=math.nan)
    with pytest.raises(InputError, match=r"none of 1 run is a finished branch.*\+sweep=critical"):
        critical_batches(runs_of_folders([tmp_path])[0], tolerance=0.01)
