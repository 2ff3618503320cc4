"""A disk that is full, from any write on: one line, code 3, and what was there is still whole."""

import errno
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gns_pretrain.data import embedded
from gns_pretrain.launch import train as launch
from gns_pretrain.runs import history
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.checkpoint_reader import root_cause
from tests.end_to_end.in_process import Ended, command, ended
from tests.runs import train_here
from tests.settings import small_run
from tests.unit.data_samples import make_texts, write_gzip, write_tokenizer
from tests.unit.run_records import write_run


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_from(number: int, monkeypatch) -> None:
    """Let every flush of a file fail from the N-th on; one function writes them all."""
    flushed, fsync = itertools.count(1), os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: no_space() if next(flushed) >= number else fsync(file)
    )


def told(end: Ended) -> str:
    """The line of a command that ended for want of space."""
    assert end.code == 3, (end.code, end.lines)
    (line,) = [line for line in end.lines if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in "".join(end.lines)
    return line


def at_each_write(call: Callable[[], Ended], *, numbers: range) -> int:
    """Run a command on a disk that is full from one write on, each time later, until it ends."""
    for number in numbers:
        with pytest.MonkeyPatch.context() as patch:
            fail_from(number, patch)
            end = call()
        if end.code == 0:
            return number
        told(end)
    end = call()
    assert end.code == 0, end.lines
    return numbers.stop


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_picture_is_replaced_by_a_whole_one_or_not_at_all(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    run = write_run(tmp_path, "table2", "signum_small", [(1, 5.0), (2, 4.0)])
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"good")
    words = ("plot-runs", run, "--panels", "loss", "--out", picture)
    with pytest.MonkeyPatch.context() as patch:
        fail_from(1, patch)
        assert str(picture) in told(command(*words))
    assert picture.read_bytes() == b"good"
    assert sorted(tmp_path.iterdir()) == [picture, run]
    assert command(*words).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_preparation_resumes_once_there_is_room(tmp_path):
    write_gzip(tmp_path / "train.json.gz", make_texts(40))
    write_tokenizer(tmp_path / "tokenizer.json")
    inputs = ("--train", tmp_path / "train.json.gz", "--tokenizer", tmp_path / "tokenizer.json")
    options = ("--validation-fraction", 0.2, "--workers", 1)

    def prepare() -> Ended:
        return command("prepare-data", "--out", tmp_path / "out", *inputs, *options)

    at_each_write(prepare, numbers=range(1, 40, 5))
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == [
        "meta.json", "tokenizer.json", "train_00000.npy", "validation_00000.npy",
    ]  # fmt: skip


def test_embedded_text_is_made_once_there_is_room(tmp_path, monkeypatch):
    documents = {f"{number}.py": text for number, text in enumerate(make_texts(300))}
    monkeypatch.setattr(embedded, "gather_documents", lambda: documents)

    def make() -> Ended:
        return ended(lambda: 0 if embedded.ensure_embedded(tmp_path, vocab_size=300) else 1)

    at_each_write(make, numbers=range(1, 9, 2))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train_here(small_run(folder, shards, steps=2)) == 0
    return folder / "small" / "checkpoints" / "step_00000002"


def test_export_leaves_nothing_half(checkpoint, tmp_path, monkeypatch):
    library = pytest.importorskip("safetensors")
    pytest.importorskip("safetensors.torch")
    words = ("export-hf", "--checkpoint", checkpoint, "--out", tmp_path / "hf")

    def full(*_: object, **__: object) -> None:
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise library.SafetensorError(text)

    with monkeypatch.context() as patch:
        patch.setattr(library.torch, "save_file", full)
        assert str(tmp_path / "hf") in told(command(*words))
    assert list(tmp_path.iterdir()) == []
    at_each_write(lambda: command(*words), numbers=range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_run_that_is_started_on_a_disk_still_full_says_so_each_time(tmp_path, shards):
    checkpoint = CheckpointSettings(every_steps=2, asynchronous=False)
    config = small_run(tmp_path, shards, steps=4, checkpoint=checkpoint)
    at_each_write(lambda: ended(lambda: train_here(config)), numbers=range(1, 60, 11))
    assert (tmp_path / "small" / "summary.json").is_file()
    left = [path.name for path in (tmp_path / "small").rglob(".*") if path.name != ".lock"]
    assert sorted(left) == [".metadata"] * 2


def test_end_that_cannot_be_noted_is_code_3(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(launch, "append_end", no_space)
    monkeypatch.setattr(history, "append_end", no_space)
    told(ended(lambda: train_here(small_run(tmp_path, shards, steps=2))))


def test_failure_of_torchs_writer_says_that_the_disk_is_full():
    file = Path("/dev/full")
    if not file.exists():
        pytest.skip("needs Linux's /dev/full")
    with pytest.raises(RuntimeError) as failed:
        torch.save({"weight": torch.zeros(10**5)}, str(file))
    assert root_cause(failed.value).startswith("the disk is full or fails, torch says [enforce")


def test_folder_of_a_setting_on_a_full_disk_is_code_3(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", no_space)
    told(ended(lambda: train_here(small_run(tmp_path, shards, steps=2))))
