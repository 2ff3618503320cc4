"""Each of the paper's five rules trains, and a killed run of it ends as if nothing had happened."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gns_pretrain.launch.train import run_rank
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings, SpecSGDSettings, SpectralSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import loop
from gns_pretrain.training.checkpoint import CheckpointSettings
from tests.distributed.harness import run_ranks
from tests.end_to_end import commands
from tests.settings import small_run, without_times

STEPS = 14
SAVED_AFTER = 5  # and after 10: checkpoint.every_steps of the small run
KILLED_AFTER = 7
MARGIN = 0.5  # nats between the first and the last training loss; seen: 0.8 to 1.3
RULES: dict[str, OptimizerSettings] = {
    "signsgd": SignumSettings(lr=1e-2, momentum=0.0),
    "signum": SignumSettings(lr=1e-2, momentum=0.9),
    "adamw": AdamWSettings(lr=2e-2),
    "specsgd": SpecSGDSettings(lr=5e-2, adamw=AdamWPart(lr=2e-2)),
    "muon": MuonSettings(lr=5e-2, adamw=AdamWPart(lr=2e-2)),
}


def lines(directory: Path) -> list[dict]:
    return [without_times(record) for record in read_records(directory / "metrics.jsonl")]


def check_training(directory: Path) -> None:
    losses = [record["loss"] for record in lines(directory) if record["kind"] == "train"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - MARGIN, losses


@pytest.mark.parametrize("rule", RULES)
def test_rule_trains_and_goes_on_bit_for_bit_after_a_kill(rule, tmp_path, shards):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    settings = RULES[rule]
    words = [f"optimizer={rule}", f"optimizer.lr={settings.lr}", "metrics.log_every=1"]
    if isinstance(settings, SpectralSettings):
        words.append(f"optimizer.adamw.lr={settings.adamw.lr}")
    whole, killed = (commands.arguments(folder, shards, *words, steps=STEPS) for folder in folders)
    assert commands.run(whole, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    check_training(folders[0] / "small")
    folders[1].mkdir()
    commands.kill_group(commands.start_and_hold(killed, folders[1], after_step=KILLED_AFTER))
    assert commands.run(killed, tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert lines(folders[1] / "small") == lines(folders[0] / "small")


def trained(place: RankInfo, folder: Path, data: Path, rule: str, name: str) -> int:
    """One rank's part of a run of two sharded ranks; returns its exit code."""
    config = small_run(
        folder,
        data,
        steps=STEPS,
        run_name=name,
        optimizer=RULES[rule],
        parallel=ParallelSettings(kind="fsdp"),
        # The kill comes in the step after a save, which must have been written by then.
        checkpoint=CheckpointSettings(every_steps=SAVED_AFTER, asynchronous=False),
    )
    here = replace(place, rendezvous=f"{place.rendezvous}-{name}")
    return run_rank(config, folder / name, "data", here)


def killed(place: RankInfo, folder: Path, data: Path, rule: str) -> None:
    """Every rank dies, by SIGKILL, as it begins its next step after KILLED_AFTER."""
    end_at(KILLED_AFTER, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trained(place, folder, data, rule, f"killed-{rule}")


def end_at(steps: int, end: Callable[[], None]) -> None:
    """Let something else happen in place of this process's next step after `steps`."""
    one_step, taken = loop.one_step, 0

    def mortal_step(*arguments: Any, **keywords: Any) -> Any:
        nonlocal taken
        if taken == steps:
            end()
        taken += 1
        return one_step(*arguments, **keywords)

    loop.one_step = mortal_step


def start_over_is_a_failure() -> None:
    raise AssertionError("more steps than were lost: the run did not go on from its checkpoint")


def whole_and_resumed(place: RankInfo, folder: Path, data: Path) -> None:
    """Every rule without a break, and what was killed of it from where it was saved."""
    one_step = loop.one_step
    for rule in RULES:
        assert trained(place, folder, data, rule, f"whole-{rule}") == 0
        end_at(STEPS - SAVED_AFTER, start_over_is_a_failure)
        assert trained(place, folder, data, rule, f"killed-{rule}") == 0
        loop.one_step = one_step


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, shards) -> Path:
    """The folder of all runs of two sharded ranks."""
    folder = tmp_path_factory.mktemp("on_two")
    for rule in RULES:
        with pytest.raises(AssertionError, match="ended without an answer"):
            run_ranks(2, killed, folder, folder, shards, rule)
    run_ranks(2, whole_and_resumed, folder, folder, shards)
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_rule_trains_and_goes_on_bit_for_bit_on_two_sharded_ranks(rule, on_two):
    check_training(on_two / f"whole-{rule}")
    assert lines(on_two / f"killed-{rule}") == lines(on_two / f"whole-{rule}")
