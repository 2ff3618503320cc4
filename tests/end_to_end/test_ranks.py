"""Two ranks of one command: whose error is told, and a request to stop while they start."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.elastic.multiprocessing.api import PContext

from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.launch import ranks as local_ranks
from gns_pretrain.launch import train as launch
from gns_pretrain.runs.history import read_starts
from gns_pretrain.training import checkpoint, loop
from tests.end_to_end import commands
from tests.settings import SEQUENCE_LENGTH, VOCABULARY

TWO_RANKS = ("launch.nproc_per_node=2", "parallel=fsdp", "seed=0")


def with_bad_token(shards: Path, folder: Path, position: int) -> Path:
    """The shards, with an id past the vocabulary inside the run's sequence at a position."""
    shutil.copytree(shards, folder)
    split = TokenShards.open(folder, "train")
    order = SequenceOrder(split.num_sequences(SEQUENCE_LENGTH), seed=0)
    token = int(order(np.array([position]))[0]) * SEQUENCE_LENGTH + SEQUENCE_LENGTH // 2
    meta = json.loads((folder / "meta.json").read_text())
    for shard in meta["shards"]:
        if token < shard["tokens"]:
            path = folder / shard["file"]
            tokens = np.load(path)
            tokens[token] = VOCABULARY
            np.save(path, tokens)
            shard["sha256"] = sha256(path.read_bytes()).hexdigest()
            break
        token -= shard["tokens"]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_error_of_one_rank_is_told_by_it_and_gives_the_code(tmp_path, shards):
    # In micro-batches of 2, the sequence at position 2 is rank 1's first.
    data = with_bad_token(shards, tmp_path / "data", position=2)
    words = commands.arguments(tmp_path, data, *TWO_RANKS)
    assert commands.run(words, tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    assert f"error: rank 1: {data}/train-0000" in log
    assert "holds the token id 61 at position" in log
    assert log.count("error: ") == 1, log
    assert "Traceback" not in log
    end = read_starts(tmp_path / "small")[-1]
    assert end["outcome"] == "failed"
    assert end["error"].startswith("another rank is gone or silent")


def run_and_hang(*arguments) -> None:
    """A rank; the second one does not come to the second step's collectives."""
    if os.environ["RANK"] == "1":
        one_step = loop.one_step

        def hang_after_one(run: loop.Run, log: loop.StepLog) -> list[loop.Reading]:
            if run.adaptive.steps == 1:
                time.sleep(commands.PATIENCE_SECONDS)
            return one_step(run, log)

        loop.one_step = hang_after_one
    launch.run_started_rank(*arguments)


def hang_with_an_impatient_agent() -> None:
    start_instead(run_and_hang)
    PContext.close.__defaults__ = (None, 1)  # seconds between SIGTERM and SIGKILL; torch has 30


def test_a_rank_that_hangs_leaves_its_stack_in_the_run_directory_and_is_named(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *TWO_RANKS, "parallel.timeout_seconds=10")
    assert commands.run(words, tmp_path / "log", hang_with_an_impatient_agent) == 1
    log = (tmp_path / "log").read_text()
    stack = tmp_path / "small" / "rank_00001.stack"
    assert "in hang_after_one" in stack.read_text()
    assert "rank 0: another rank is gone or silent" in log
    assert log.splitlines()[-1] == f"where ranks were: {stack}"
    assert "Traceback" not in log
    # The next start replaces what it may leave, and a rank that ends by itself leaves nothing.
    assert commands.run(words[:-1], tmp_path / "log") == 0
    assert list((tmp_path / "small").glob("rank_*")) == []


def asked_before_there_are_ranks() -> None:
    start_server = local_ranks.start_fork_server

    def asked_then_started() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        start_server()

    local_ranks.start_fork_server = asked_then_started


def interrupted_then_run(*arguments) -> None:
    """A rank that Ctrl-C reaches before it listens."""
    os.kill(os.getpid(), signal.SIGINT)
    launch.run_started_rank(*arguments)


def start_instead(entrypoint: Callable[..., None]) -> None:
    """Sabotage: the command starts these ranks in place of its own."""
    run_local_ranks = launch.run_local_ranks
    launch.run_local_ranks = lambda _, *rest: run_local_ranks(entrypoint, *rest)


def interrupted_while_the_ranks_start() -> None:
    start_instead(interrupted_then_run)


@pytest.mark.parametrize(
    "sabotage", [asked_before_there_are_ranks, interrupted_while_the_ranks_start]
)
def test_request_to_stop_while_the_ranks_start_is_kept(sabotage, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *TWO_RANKS)
    assert commands.run(words, tmp_path / "log", sabotage) == 75
    assert "asked to stop: saved at step 1;" in (tmp_path / "log").read_text()


def full(*arguments, **keywords) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def run_with_a_full_disk(*arguments) -> None:
    """A rank; the second one's disk has no room left for what the ranks save together."""
    if os.environ["RANK"] == "1":
        checkpoint.dcp.FileSystemWriter.write_data = full
    launch.run_started_rank(*arguments)


def run_with_an_unreadable_disk(*arguments) -> None:
    """A rank; the second one cannot read back what it has saved."""
    if os.environ["RANK"] == "1":
        checkpoint.digests_of = full
    launch.run_started_rank(*arguments)


@pytest.mark.parametrize("rank", [run_with_a_full_disk, run_with_an_unreadable_disk])
def test_save_that_fails_on_one_rank_ends_all_in_one_line(rank, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *TWO_RANKS, "checkpoint.every_steps=2")
    assert commands.run(words, tmp_path / "log", partial(start_instead, rank)) == 3
    log = (tmp_path / "log").read_text()
    assert log.count("error: ") == 1, log
    assert "error: step 2: the checkpoint " in log
    assert "could not be written ([Errno 28] No space left on device); none is older" in log
    assert "Traceback" not in log
    assert list((tmp_path / "small" / "checkpoints").iterdir()) == []


def test_run_without_a_whole_checkpoint_is_refused_in_one_line(tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *TWO_RANKS, steps=2)
    assert commands.run(words, tmp_path / "log") == 0
    (tmp_path / "small" / "summary.json").unlink()
    (manifest,) = (tmp_path / "small" / "checkpoints").glob("*/manifest.json")
    manifest.unlink()
    assert commands.run(words, tmp_path / "log") == 3
    log = (tmp_path / "log").read_text()
    assert log.count("error: ") == 1, log
    assert "no whole checkpoint is left" in log
