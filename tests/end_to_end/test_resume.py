"""Killed at any moment and started again, a run ends as if nothing had happened."""

import math
import os
import signal
from pathlib import Path

import pytest

from gns_pretrain.runs.directory import is_finished
from gns_pretrain.runs.history import read_starts
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import checkpoint, loop
from gns_pretrain.training.checkpoint_reader import damage
from tests.end_to_end import commands
from tests.settings import without_times

STEPS = 20
FSDP_ON_TWO = ("launch.nproc_per_node=2", "parallel=fsdp")


def lines(folder: Path, name: str = "small") -> list[dict]:
    return [without_times(record) for record in read_records(folder / name / "metrics.jsonl")]


def uninterrupted(folder: Path, data: Path, *more: str, name: str = "small") -> list[dict]:
    words = commands.arguments(folder, data, f"run_name={name}", *more)
    assert commands.run(words, folder / "log") == 0
    return lines(folder, name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, shards) -> list[dict]:
    return uninterrupted(tmp_path_factory.mktemp("whole"), shards)


@pytest.fixture(scope="module")
def expected_on_two(tmp_path_factory, shards) -> list[dict]:
    return uninterrupted(tmp_path_factory.mktemp("whole_on_two"), shards, *FSDP_ON_TWO)


def check_same_losses(found: list[dict], expected: list[dict]) -> None:
    """The lines of another layout: its sums are rounded in another order."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine["kind"], mine["step"], mine["tokens"]) == (
            theirs["kind"],
            theirs["step"],
            theirs["tokens"],
        )
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def kill_self(*arguments, **keywords) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_hashing_the_second_checkpoint() -> None:
    seal = checkpoint.seal

    def seal_once(folder, digests):
        if "step_00000010" in folder.name:
            kill_self()
        seal(folder, digests)

    checkpoint.seal = seal_once


def die_before_the_rename() -> None:
    checkpoint.publish = kill_self


def die_while_removing_old_checkpoints() -> None:
    checkpoint.Checkpoints._prune = kill_self


@pytest.mark.parametrize("step", [1, 7, 10])
def test_killed_after_a_step_it_ends_with_the_same_lines(step, expected, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, "metrics.log_every=1")
    process = commands.start(words, tmp_path / "log")
    commands.wait_for_line(tmp_path / "small" / "metrics.jsonl", step, process)
    commands.kill_group(process)
    assert commands.run(words, tmp_path / "log") == 0
    assert lines(tmp_path) == expected


@pytest.mark.parametrize(
    "sabotage",
    [
        die_while_hashing_the_second_checkpoint,
        die_before_the_rename,
        die_while_removing_old_checkpoints,
    ],
)
def test_killed_while_saving_it_ends_with_the_same_lines(sabotage, expected, tmp_path, shards):
    words = commands.arguments(tmp_path, shards)
    assert commands.run(words, tmp_path / "log", sabotage) == -signal.SIGKILL
    assert commands.run(words, tmp_path / "log") == 0
    assert lines(tmp_path) == expected


@pytest.mark.parametrize("kill", [commands.kill_group, commands.kill_alone])
def test_two_sharded_ranks_killed_go_on_bit_for_bit(kill, expected_on_two, tmp_path, shards):
    """Killed all together, or only what started them: then they leave by themselves."""
    words = commands.arguments(tmp_path, shards, *FSDP_ON_TWO, "metrics.log_every=1")
    kill(commands.start_and_hold(words, tmp_path, after_step=12))
    assert commands.run(words, tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert lines(tmp_path) == expected_on_two


def test_one_process_takes_over_from_two_ranks_with_the_same_sequences(expected, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *FSDP_ON_TWO)
    commands.kill_group(commands.start_and_hold(words, tmp_path, after_step=12))
    assert commands.run(commands.arguments(tmp_path, shards), tmp_path / "log") == 0
    check_same_losses(lines(tmp_path), expected)


def test_run_resumes_with_and_without_tensor_parallelism(tmp_path, shards):
    model = ("model.dim=24", "model.num_heads=4", "model.num_kv_heads=2")
    expected = uninterrupted(tmp_path, shards, *model, name="whole")
    words = commands.arguments(tmp_path, shards, *model)
    tensor = [*words, "launch.nproc_per_node=2", "parallel=fsdp", "parallel.tensor_size=2"]
    commands.kill_group(commands.start_and_hold(words, tmp_path, after_step=6))
    commands.kill_group(commands.start_and_hold(tensor, tmp_path, after_step=12))
    assert "resumed from step 5" in (tmp_path / "log").read_text()
    assert commands.run(words, tmp_path / "log") == 0
    assert "resumed from step 10" in (tmp_path / "log").read_text()
    check_same_losses(lines(tmp_path), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves_with_its_own_code(number, expected, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, "metrics.log_every=1")
    process = commands.start_and_hold(words, tmp_path, after_step=2)
    os.kill(process.pid, number)
    commands.let_go(tmp_path)
    assert commands.finish(process) == 75
    assert "asked to stop: saved at step" in (tmp_path / "log").read_text()
    assert commands.run(words, tmp_path / "log") == 0
    assert lines(tmp_path) == expected


def test_launcher_of_two_ranks_hands_a_signal_on_and_keeps_the_code(
    expected_on_two, tmp_path, shards
):
    words = commands.arguments(tmp_path, shards, *FSDP_ON_TWO, "metrics.log_every=1")
    process = commands.start_and_hold(words, tmp_path, after_step=2)
    os.kill(process.pid, signal.SIGUSR1)
    commands.let_go(tmp_path)
    assert commands.finish(process) == 75
    assert commands.run(words, tmp_path / "log") == 0
    assert lines(tmp_path) == expected_on_two


def test_finished_run_says_so_and_trains_nothing(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, steps=2)
    assert commands.run(words, tmp_path / "log") == 0
    before = (tmp_path / "small" / "metrics.jsonl").read_bytes()
    assert commands.run(words, tmp_path / "log") == 0
    assert "is finished; resume=never restarts it" in (tmp_path / "log").read_text()
    assert (tmp_path / "small" / "metrics.jsonl").read_bytes() == before


def test_resume_never_starts_over_in_a_fresh_folder(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, steps=2)
    assert commands.run(words, tmp_path / "log") == 0
    assert commands.run([*words, "resume=never"], tmp_path / "log") == 0
    first, second = (
        (tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("small", "small-2")
    )
    assert first == second > 0


def test_run_in_a_fresh_folder_is_stopped_and_goes_on_by_its_own_name(tmp_path, shards):
    (tmp_path / "small").mkdir()
    words = commands.arguments(tmp_path, shards, "metrics.log_every=1")
    never = [*words, "resume=never"]
    process = commands.start_and_hold(never, tmp_path, after_step=2, name="small-2")
    os.kill(process.pid, signal.SIGTERM)
    commands.let_go(tmp_path)
    assert commands.finish(process) == 75
    way_on = "start it again with run_name=small-2 resume=auto"
    assert way_on in (tmp_path / "log").read_text()
    again = [*never, *way_on.split()[-2:]]
    assert commands.run(again, tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert is_finished(tmp_path / "small-2")
    assert sorted(path.name for path in tmp_path.glob("small*")) == ["small", "small-2"]


def test_damaged_newest_checkpoint_is_named_and_the_run_ends_the_same(expected, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, "metrics.log_every=1")
    commands.kill_group(commands.start_and_hold(words, tmp_path, after_step=16))
    newest = checkpoint.checkpoint_folders(tmp_path / "small" / "checkpoints")[0]
    path = next(newest.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    assert commands.run(words, tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert f"{newest.name} is damaged" in log
    assert lines(tmp_path) == expected


def lose_the_fourth_step() -> None:
    take = loop.one_step

    def one_step(run, log):
        if run.adaptive.steps == 3:
            run.model.register_forward_hook(lambda model, inputs, loss: loss * math.nan)
        return take(run, log)

    loop.one_step = one_step


def test_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(
    tmp_path, shards
):
    words = commands.arguments(tmp_path, shards, "checkpoint.every_steps=1")
    assert commands.run(words, tmp_path / "log", lose_the_fourth_step) == 3
    log = (tmp_path / "log").read_text()
    assert "error: step 4: the loss is nan, not finite" in log
    assert "Traceback" not in log
    folders = checkpoint.checkpoint_folders(tmp_path / "small" / "checkpoints")
    assert [folder.name for folder in folders] == ["step_00000003", "step_00000002"]
    assert [damage(folder) for folder in folders] == [None, None]
    assert f"init.from={folders[0]} init.what=all and a lower optimizer.lr" in log
    end = read_starts(tmp_path / "small")[-1]
    assert (end["outcome"], end["error"].partition(",")[0]) == ("failed", "step 4: the loss is nan")


def test_failure_without_a_checkpoint_speaks_of_none(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, "optimizer.lr=1e35", "gradient_clip=null")
    assert commands.run(words, tmp_path / "log") == 3
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert "start anew under another run_name with a lower optimizer.lr" in line
    assert "checkpoint" not in line
    assert not checkpoint.checkpoint_folders(tmp_path / "small" / "checkpoints")


def test_a_rank_that_is_killed_is_named_in_one_line(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *FSDP_ON_TWO, "metrics.log_every=1")
    process = commands.start_and_hold(words, tmp_path, after_step=2)
    start = read_starts(tmp_path / "small")[0]
    os.kill(start["process"], signal.SIGKILL)
    commands.let_go(tmp_path)
    assert commands.finish(process) == 1
    log = (tmp_path / "log").read_text().splitlines()
    line = f"error: rank 0 (process {start['process']}) ended by SIGKILL"
    begun = next(number for number, text in enumerate(log) if text.startswith("step 1 "))
    later = [text for text in log[begun:] if not text.startswith("step ")]
    assert later[-1].startswith(line)
    assert len(later) <= 2  # of the rank left
