"""What a resumed run relies on is there and belongs together, or the command says what is not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.train import check_run
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.checkpoint_reader import checkpoint_folders
from tests.end_to_end import commands
from tests.runs import train_here
from tests.settings import small_run

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, shards) -> Path:
    """A run that was saved at steps 5, 10 and 12, and stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    assert train_here(small_run(folder, shards), stop_after=12) == 75
    return folder / "small"


@pytest.fixture
def again(stopped, tmp_path, shards) -> Config:
    """The settings of a copy of that run."""
    shutil.copytree(stopped, tmp_path / "small")
    return small_run(tmp_path, shards)


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a run but those to which a start adds itself, or writes its own settings."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if path.name not in (".lock", "starts.jsonl", "config.yaml")
    }


def delete(name: str) -> Change:
    def lose(run: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return lose


def overwrite(name: str, write: Callable[[bytes], bytes]) -> Change:
    return lambda run: (run / name).write_bytes(write((run / name).read_bytes()))


@pytest.mark.parametrize(
    ("lose", "line"),
    [
        (delete("metrics.jsonl"), "ends at step 0, but the checkpoint is of step 12"),
        (overwrite("metrics.jsonl", lambda old: b""), "ends at step 0, but the checkpoint is"),
        (overwrite("metrics.jsonl", lambda old: bytes(len(old))), "ends at step 0, but the check"),
        (overwrite("metrics.jsonl", lambda old: old[:900]), "but the checkpoint is of step 12"),
        (delete("checkpoints"), "checkpoints holds no checkpoint, but the run has saved some"),
        (delete("config.yaml"), "config.yaml is missing"),
        (delete("run.json"), "run.json is missing"),
        (overwrite("run.json", lambda old: b"[]"), r"run\.json (cannot be read|is not|lacks)"),
        (overwrite("run.json", lambda old: b"null"), r"run\.json (cannot be read|is not|lacks)"),
        (overwrite("run.json", lambda old: b"[" * 100_000), r"run\.json is not valid JSON"),
        (overwrite("config.yaml", lambda old: b"null"), "config.yaml is damaged"),
        (overwrite("config.yaml", lambda old: b"[" * 10_000), "config.yaml is damaged"),
        (overwrite("config.yaml", lambda old: b"\xff"), "config.yaml is damaged"),
    ],
)
def test_what_is_lost_is_named_and_the_rest_is_left_as_it_is(lose, line, again):
    run = Path(again.output_directory) / "small"
    lose(run)
    before = contents(run)
    with pytest.raises(InputError, match=line):
        train_here(again)
    assert contents(run) == before


@pytest.mark.parametrize("text", [b"[]", b"null", b"{}", b"\xff", b'{"state": "finished"}'])
@pytest.mark.parametrize("name", ["summary.json", ".lock"])
def test_of_a_file_that_no_resume_relies_on_any_content_will_do(name, text, again):
    run = Path(again.output_directory) / "small"
    (run / name).write_bytes(text)
    assert train_here(again, stop_after=1) == 75


def test_on_two_ranks_one_line_says_what_is_lost(again, tmp_path, shards):
    (tmp_path / "small" / "metrics.jsonl").unlink()
    words = commands.arguments(tmp_path, shards, "model.vocab_size=61", "model.name=odd")
    assert commands.run([*words, "launch.nproc_per_node=2"], tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    (line,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {tmp_path}/small/metrics.jsonl ends at step 0")


def test_a_checkpoint_called_by_another_step_is_not_used_and_that_step_is_saved(again, capsys):
    folder = Path(again.output_directory) / "small" / "checkpoints"
    (folder / "step_00000012").rename(folder / "step_00000015")
    assert train_here(again, stop_after=6) == 75
    printed = capsys.readouterr().out
    assert "it holds step 12, so its folder was renamed); the one before it is used" in printed
    assert "resumed from step 10" in printed
    assert checkpoint_folders(folder)[1].name == "step_00000015"
    assert '"step": 15' in (folder / "step_00000015" / "train_state.json").read_text()


@pytest.mark.parametrize("every_steps", [100, 1])
@pytest.mark.parametrize(
    "lose",
    [
        lambda run: run.rename(run.with_name("renamed")),
        lambda run: shutil.rmtree(run.rename(run.with_name("deleted"))),  # a save may be under way
        delete("metrics.jsonl"),
        lambda run: (run / "metrics.jsonl").rename(run / "metrics.old"),
        lambda run: (run.rename(run.with_name("renamed")), run.mkdir()),
    ],
    ids=["renamed", "deleted", "record deleted", "record renamed", "replaced"],
)
def test_a_running_run_that_loses_its_folder_or_record_stops_and_writes_nothing_more(
    lose, every_steps, tmp_path, shards
):
    checkpoint = CheckpointSettings(every_steps=every_steps)
    config = small_run(tmp_path, shards, checkpoint=checkpoint)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl or its folder has been moved"):
        train_here(config, meanwhile={7: lambda: lose(tmp_path / "small")})
    assert not (tmp_path / "small" / "metrics.jsonl").exists()
    assert not (tmp_path / "small" / "summary.json").exists()
    assert not (tmp_path / "small" / "checkpoints" / "step_00000020").exists()


def test_settings_are_compared_again_once_the_directory_is_taken(tmp_path, shards):
    """Two commands of one second: neither finds the other's run at its first look."""
    first, second = (small_run(tmp_path, shards, seed=seed) for seed in (0, 1))
    check_run(second, None)
    with pytest.raises(InputError, match="other settings: seed was 0 and is now 1"):
        train_here(second, before=lambda: train_here(first))
    assert "seed: 0" in (tmp_path / "small" / "config.yaml").read_text()
