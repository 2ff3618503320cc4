"""Ranks for tests: N processes on this machine, joined by gloo through a file, no port needed."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gns_pretrain.parallel.mesh import RankInfo

# A fork of a server that has imported torch once costs a fraction of a second; a spawn costs four.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "torch.distributed.fsdp", "gns_pretrain.launch.train"]
CONTEXT.set_forkserver_preload(PRELOAD)
PATIENCE_SECONDS = 240


def run_ranks(num_ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list:
    """Call `function(place, *arguments)` on each of `num_ranks` ranks.

    Args:
        num_ranks: processes.
        function: of a module, so that it can be found by name in another process.
        folder: where the ranks find one another; a new file in it each call.
        arguments: handed to each rank.

    Returns:
        What each rank returned, in their order.

    Raises:
        AssertionError: a rank failed; with its traceback.
    """
    meeting = folder / f"meeting_{len(list(folder.glob('meeting_*')))}"
    processes, pipes = [], []
    for rank in range(num_ranks):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        place = RankInfo(rank, num_ranks, rank, num_ranks, f"file://{meeting}")
        process = CONTEXT.Process(target=call, args=(theirs, function, place, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return [received(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def call(pipe: Connection, function: Callable[..., Any], place: RankInfo, arguments: tuple) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    try:
        pipe.send(("returned", function(place, *arguments)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def received(pipe: Connection, rank: int) -> Any:
    """A rank's answer."""
    assert pipe.poll(PATIENCE_SECONDS), f"rank {rank} did not answer in {PATIENCE_SECONDS} s"
    try:
        outcome, value = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} ended without an answer") from None
    assert outcome == "returned", f"rank {rank}:\n{value}"
    return value
