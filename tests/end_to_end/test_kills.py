"""Killed at any change of a file and started again, a command ends as if unbroken."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gns_pretrain.commands import export_hf
from gns_pretrain.data import embedded
from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from tests.distributed.harness import CONTEXT, PATIENCE_SECONDS
from tests.runs import train_here
from tests.settings import small_run, without_times
from tests.unit.data_samples import make_texts, write_gzip, write_tokenizer

KILLED = 137
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What holds times, or ids that are drawn: torch's metadata, and the manifest with its sum.
TIMED = ("summary.json", "run.json", "starts.jsonl", ".lock", ".metadata", "manifest.json")
Command = Callable[[Path], object]


class Killer:
    """Ends this process before its N-th change of a file below a folder, as a kill would."""

    def __init__(self, folder: Path, number: int | None) -> None:
        self.folder, self.number, self.seen = str(folder), number, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and arguments[2] & WRITING)
        if not changes or not str(arguments[0]).startswith(self.folder):
            return
        self.seen += 1
        if self.seen == self.number:
            os._exit(KILLED)


def forked(command: Command, folder: Path, number: int | None) -> int:
    """Run a command in a fork of this process, to its end or its kill; return its exit code.

    Not killed, it leaves the number of its changes beside the folder.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with (folder.parent / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        killer = Killer(folder, number)
        command(folder)
        (folder.parent / "changes").write_text(str(killer.seen))
        code = 0
    finally:
        os._exit(code)


def kill_everywhere(command: Command, contents: Command, folder: Path, every: int) -> list[str]:
    """Kill a command at every `every`-th change, and start it again; return what is wrong then."""
    target = folder / "place"
    target.mkdir()
    assert forked(command, target, None) == 0, (folder / "log").read_text()
    unbroken, changes = contents(target), int((folder / "changes").read_text())
    problems = [] if changes > 5 else [f"it changes files {changes} times alone"]
    for number in range(1, changes + 1, every):
        shutil.rmtree(target)
        target.mkdir()
        if (code := forked(command, target, number)) != KILLED:
            problems.append(f"{number}: code {code}: {(folder / 'log').read_text()[-300:]}")
        if (code := forked(command, target, None)) != 0:
            problems.append(f"{number}, again: code {code}: {(folder / 'log').read_text()[-300:]}")
        elif (found := contents(target)) != unbroken:
            problems.append(f"{number}, again: {differences(found, unbroken)}")
    return problems


def differences(found: Any, wanted: Any) -> list[str]:
    return [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """All files by name, whatever hides among them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def trained(folder: Path) -> dict[str, object]:
    """A run's files; what holds a time or names a start counts by its name alone."""
    files: dict[str, object] = dict(all_bytes(folder))
    for name in files:
        path = folder / name
        if path.name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            files[name] = [without_times(json.loads(line)) for line in lines]
        elif path.name in TIMED:
            files[name] = None
    return files


def train_shortly(shards: Path, folder: Path) -> None:
    checkpoint = CheckpointSettings(every_steps=1, keep=1)
    assert train_here(small_run(folder, shards, steps=2, checkpoint=checkpoint)) == 0


def prepare_texts(inputs: Path, folder: Path) -> None:
    settings = PrepareSettings(
        out=str(folder / "out"),
        train=[str(inputs / "train.json.gz")],
        validation_fraction=0.2,
        tokenizer=str(inputs / "tokenizer.json"),
        workers=1,
        shard_tokens=1500,
    )
    prepare(settings, show_progress=False)


def make_embedded(folder: Path) -> None:
    documents = {f"{number}.py": text for number, text in enumerate(make_texts(300))}
    embedded.gather_documents = lambda: documents
    embedded.ensure_embedded(folder, vocab_size=300)


def export(checkpoint: Path, folder: Path) -> None:
    if (folder / "out").exists():  # killed after its last change, it had made the folder
        return
    sys.argv = ["export-hf", "--checkpoint", str(checkpoint), "--out", str(folder / "out")]
    export_hf.main()


def call(pipe: Any, arguments: tuple[Any, ...]) -> None:
    """What the process does that is forked for each kill; it never trains, which forbids forks."""
    pipe.send(kill_everywhere(*arguments))


def problems_of(command: Command, contents: Command, folder: Path, every: int) -> list[str]:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=call, args=(theirs, (command, contents, folder, every)))
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_SECONDS)
        return ours.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("kind", ["train", "prepare", "embedded", "export"])
def test_killed_anywhere_and_started_again_it_ends_as_if_unbroken(kind, tmp_path, shards):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    contents: Command = all_bytes
    if kind == "train":
        command, contents, every = partial(train_shortly, shards), trained, 11
    elif kind == "prepare":
        write_gzip(inputs / "train.json.gz", make_texts(60))
        write_tokenizer(inputs / "tokenizer.json")
        command, every = partial(prepare_texts, inputs), 4
    elif kind == "embedded":
        command, every = make_embedded, 3
    else:
        pytest.importorskip("safetensors")
        train_shortly(shards, inputs)
        command, every = partial(export, inputs / "small" / "checkpoints" / "step_00000002"), 3
    folder = tmp_path / "kills"
    folder.mkdir()
    assert problems_of(command, contents, folder, every) == []
