"""A run that saves itself beside training keeps every promise of one that waits for each save."""

import threading
import time
from pathlib import Path

import pytest

from gns_pretrain.errors import TrainingError
from gns_pretrain.runs.history import read_starts
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import checkpoint
from gns_pretrain.training.checkpoint import Checkpoints, CheckpointSettings
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, damage
from tests.runs import ALONE, train_here
from tests.settings import small_run
from tests.unit.training.test_checkpoint import built

PATIENCE_SECONDS = 60


class Gate:
    """Holds every save just before it is sealed, from when one has come until `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, then: OSError | None = None) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        seal = checkpoint.seal

        def held(*arguments) -> None:
            self.reached.set()
            assert self._opened.wait(PATIENCE_SECONDS)
            if then is not None:
                raise then
            seal(*arguments)

        monkeypatch.setattr(checkpoint, "seal", held)

    def open(self) -> None:
        self._opened.set()

    def open_soon(self) -> None:
        """Open while the run is already waiting for it."""
        threading.Timer(1.0, self.open).start()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(PATIENCE_SECONDS)


def trained_steps(folder: Path) -> list[int]:
    lines = read_records(folder / "small" / "metrics.jsonl")
    return [line["step"] for line in lines if line["kind"] == "train"]


def names_of(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder / "small" / "checkpoints")]


def test_training_goes_on_while_a_save_is_written_and_what_is_not_sealed_does_not_count(
    tmp_path, shards, monkeypatch
):
    gate = Gate(monkeypatch)
    seen = []

    def look() -> None:
        gate.wait_until_reached()
        seen.append(names_of(tmp_path))
        gate.open()

    assert train_here(small_run(tmp_path, shards, steps=9), meanwhile={8: look}) == 0
    assert seen == [[]]
    assert names_of(tmp_path) == ["step_00000009", "step_00000005"]


def test_next_save_waits_for_the_one_that_is_under_way(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    model, optimizer = built()
    checkpoints = Checkpoints(tmp_path, keep=2, world=ALONE, beside=ALONE)
    checkpoints.save(model, optimizer, {"step": 1})
    gate.wait_until_reached()
    gate.open_soon()
    checkpoints.save(model, optimizer, {"step": 2})
    assert damage(tmp_path / "step_00000001") is None
    checkpoints.close()
    assert damage(tmp_path / "step_00000002") is None


def test_stop_waits_for_the_save_under_way_and_for_its_own(tmp_path, shards, monkeypatch):
    gate = Gate(monkeypatch)
    config = small_run(tmp_path, shards)
    assert train_here(config, stop_after=7, meanwhile={7: gate.open_soon}) == 75
    assert names_of(tmp_path) == ["step_00000007", "step_00000005"]
    assert [damage(f) for f in checkpoint_folders(tmp_path / "small" / "checkpoints")] == [None] * 2


def test_failed_save_ends_the_run_at_the_next_step_in_one_line(
    tmp_path, shards, monkeypatch, capsys
):
    gate = Gate(monkeypatch, then=OSError(28, "No space left on device"))

    def fail() -> None:
        gate.open()
        time.sleep(1.0)  # until the thread has let go

    with pytest.raises(TrainingError, match=r"step 5: the checkpoint .*No space left"):
        train_here(small_run(tmp_path, shards), meanwhile={7: fail})
    assert max(trained_steps(tmp_path)) < 10  # of the next save
    assert list((tmp_path / "small" / "checkpoints").iterdir()) == []
    assert capsys.readouterr().err == ""  # the error that was raised is the only one
    assert "step 5: the checkpoint" in read_starts(tmp_path / "small")[-1]["error"]


def test_failed_last_save_ends_the_run_as_failed(tmp_path, shards, monkeypatch):
    Gate(monkeypatch, then=OSError(28, "No space left on device")).open()
    with pytest.raises(TrainingError, match=r"step 3: the checkpoint .*No space left"):
        train_here(small_run(tmp_path, shards, steps=3))
    assert not (tmp_path / "small" / "summary.json").exists()


@pytest.mark.parametrize("then", [None, OSError(28, "No space left on device")])
def test_error_of_training_lets_the_save_end_and_hides_no_failure_of_it(
    then, tmp_path, shards, monkeypatch, capsys
):
    gate = Gate(monkeypatch, then=then)

    def break_down() -> None:
        gate.open_soon()
        raise TrainingError("step 6: the loss is nan", on_all_ranks=True)

    with pytest.raises(TrainingError, match="the loss is nan"):
        train_here(small_run(tmp_path, shards), meanwhile={6: break_down})
    assert names_of(tmp_path) == ([] if then else ["step_00000005"])
    assert ("error: step 5: the checkpoint" in capsys.readouterr().err) is (then is not None)


def test_setting_changes_no_line_and_no_weight(tmp_path, shards):
    found = []
    for asynchronous in (True, False):
        settings = CheckpointSettings(every_steps=5, asynchronous=asynchronous)
        folder = tmp_path / str(asynchronous)
        folder.mkdir()
        assert train_here(small_run(folder, shards, steps=6, checkpoint=settings)) == 0
        newest = checkpoint_folders(folder / "small" / "checkpoints")[0]
        found.append((trained_steps(folder), (newest / "__0_0.distcp").read_bytes()))
    assert found[0] == found[1]
