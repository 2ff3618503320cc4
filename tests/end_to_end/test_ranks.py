"""Two ranks of one command: whose error is told, and a request to stop while they start."""

import json
import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from gns_pretrain import launch
from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.tokens import TokenSplit
from gns_pretrain.distributed import local_ranks
from gns_pretrain.starts import read_starts
from tests.end_to_end import commands
from tests.settings import SEQUENCE_LENGTH, VOCABULARY

TWO_RANKS = ("launch.nproc_per_node=2", "parallel=fsdp", "seed=0")


def with_bad_token(shards: Path, folder: Path, position: int) -> Path:
    """The shards, with an id past the vocabulary inside the run's sequence at a position."""
    shutil.copytree(shards, folder)
    split = TokenSplit.open(folder, "train")
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


def asked_before_there_are_ranks() -> None:
    start_server = local_ranks.start_server_without_signals

    def asked_then_started() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        start_server()

    local_ranks.start_server_without_signals = asked_then_started


def interrupted_then_run(*arguments) -> None:
    """A rank that Ctrl-C reaches before it listens."""
    os.kill(os.getpid(), signal.SIGINT)
    launch.run_started_rank(*arguments)


def interrupted_while_the_ranks_start() -> None:
    run_local_ranks = launch.run_local_ranks
    launch.run_local_ranks = lambda entrypoint, *rest: run_local_ranks(interrupted_then_run, *rest)


@pytest.mark.parametrize(
    "sabotage", [asked_before_there_are_ranks, interrupted_while_the_ranks_start]
)
def test_request_to_stop_while_the_ranks_start_is_kept(sabotage, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, *TWO_RANKS)
    assert commands.run(words, tmp_path / "log", sabotage) == 75
    assert "asked to stop: saved at step 1;" in (tmp_path / "log").read_text()
