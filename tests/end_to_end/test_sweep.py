"""`python train.py -m ...`: what fails stops nothing, and what is done is not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.end_to_end import commands

TIMEOUT_SECONDS = 150


def sweep(folder: Path, data: Path, *more: str) -> tuple[int, str]:
    """Three learning rates, the last of which no training survives."""
    words = [
        word
        for word in commands.arguments(folder, data, steps=4)
        if not word.startswith(("run_name", "optimizer.lr"))
    ]
    answer = subprocess.run(
        [sys.executable, "train.py", "-m", *words, "run_name=lr${optimizer.lr}", *more],
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    return answer.returncode, answer.stdout + answer.stderr


@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_sweep_runs_all_says_what_failed_and_goes_on_with_it(tmp_path, shards):
    code, text = sweep(
        tmp_path, shards, "optimizer.lr=1e-2,1e38,1e-3", "hydra.launcher.max_parallel=2"
    )
    assert code == 3, text
    assert "1 of the sweep's 3 runs failed (lr1e+38)" in text
    for lr in ("0.01", "0.001"):
        summary = json.loads((tmp_path / f"lr{lr}" / "summary.json").read_text())
        assert summary["steps"] == 4
        assert f"lr{lr} finished" in text
    assert "lr1e+38 failed: " in text
    assert "not finite" in text
    before = (tmp_path / "lr0.01" / "metrics.jsonl").read_bytes()

    code, text = sweep(tmp_path, shards, "optimizer.lr=1e-2,1e-3")
    assert code == 0, text
    assert text.count("skipped: it was finished") == 2
    assert (tmp_path / "lr0.01" / "metrics.jsonl").read_bytes() == before


def test_sweep_with_one_impossible_run_starts_none(tmp_path, shards):
    code, text = sweep(tmp_path, shards, "optimizer.lr=1e-2", "batch_size.initial=8,7")
    assert code == 2, text
    assert "1 of the sweep's 2 runs cannot be started" in text
    assert "batch_size.initial=7" in text
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_optuna_goes_on_past_a_point_that_fails_and_the_command_tells(tmp_path, shards):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `tune` is missing")
    code, text = sweep(
        tmp_path,
        shards,
        "optimizer.lr=1e38,1e-2",
        "hydra/sweeper=search",
        "hydra.sweeper.sampler.seed=0",  # it tries 1e-2, then 1e38, then 1e-2 again
        "hydra.sweeper.n_trials=3",
    )
    assert code == 3, text
    assert "1 of the sweep's 3 runs failed (lr1e+38)" in text
    assert "lr0.01 skipped: it was finished" in text.partition("lr1e+38 failed")[2]
    (summary,) = tmp_path.glob("lr*/summary.json")
    assert summary.parent.name == "lr0.01"
    best = yaml.safe_load((tmp_path / "logs" / "optimization_results.yaml").read_text())
    assert best["best_value"] == json.loads(summary.read_text())["minimum_validation_loss"]


def test_a_search_none_of_whose_points_can_be_trained_ends_in_one_line(tmp_path, shards):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `tune` is missing")
    code, text = sweep(
        tmp_path, shards, "optimizer.lr=1e38", "hydra/sweeper=search", "hydra.sweeper.n_trials=1"
    )
    assert code == 3, text
    assert text.splitlines()[-1].startswith("error: 1 of the sweep's 1 runs failed (lr1e+38)")
