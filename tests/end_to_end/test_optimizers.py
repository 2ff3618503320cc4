"""Each of the paper's five rules trains, and a killed run of it ends as if nothing had happened."""

from pathlib import Path

import pytest

from gns_pretrain.metrics.jsonl import read_records
from tests.end_to_end import commands
from tests.settings import without_times

STEPS = 14
KILLED_AFTER = 7  # past the checkpoint of step 5, before that of step 10
MARGIN = 0.3  # nats between the first and the last training loss
RULES = {
    "signsgd": ["optimizer=signsgd", "optimizer.lr=1e-2"],
    "signum": ["optimizer=signum", "optimizer.lr=1e-2", "optimizer.momentum=0.9"],
    "adamw": ["optimizer=adamw", "optimizer.lr=2e-2"],
    "specsgd": ["optimizer=specsgd", "optimizer.lr=5e-2", "optimizer.adamw.lr=2e-2"],
    "muon": ["optimizer=muon", "optimizer.lr=5e-2", "optimizer.adamw.lr=2e-2"],
}


def lines(folder: Path) -> list[dict]:
    return [without_times(record) for record in read_records(folder / "small" / "metrics.jsonl")]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_rule_trains_and_goes_on_bit_for_bit_after_a_kill(rule, ranks, tmp_path, shards):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    layout = [f"launch.nproc_per_node={ranks}", "parallel=fsdp", "metrics.log_every=1"]
    whole, killed = (
        commands.arguments(folder, shards, *layout, *RULES[rule], steps=STEPS) for folder in folders
    )
    assert commands.run(whole, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    expected = lines(folders[0])
    losses = [record["loss"] for record in expected if record["kind"] == "train"]
    assert losses[-1] < losses[0] - MARGIN, losses
    process = commands.start(killed, tmp_path / "log")
    commands.wait_for_line(folders[1] / "small" / "metrics.jsonl", KILLED_AFTER, process)
    commands.kill_group(process)
    assert commands.run(killed, tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert lines(folders[1]) == expected
