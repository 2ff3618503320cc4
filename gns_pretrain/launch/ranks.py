"""Where a process stands among those that were started with it. Four ways, told apart here alone.

nothing set, launch.nproc_per_node=1    one process
nothing set, launch.nproc_per_node=N    this command starts N ranks on this machine
RANK set                                torchrun, or anything that sets its variables
a SLURM step of several tasks           srun or the SLURM launcher, with one task a GPU
"""

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessExitedException

from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.system.processes import STOP_SIGNALS
from gns_pretrain.system.slurm import first_host

# N ranks on this machine as children of one command.

EXIT_ORPHANED = 130
AGENT_LOG = "torch.distributed.elastic.multiprocessing.api"


def run_local_ranks(entrypoint: Callable[..., object], arguments: tuple[Any, ...], n: int) -> None:
    """Start n ranks through torch's elastic agent and wait for them.

    Args:
        entrypoint: a rank, called with `arguments`, the memory of `signals_noted` and what
            `leave_with_launcher` waits on.
        arguments: anything that can be pickled.

    Raises:
        ChildFailedError: a rank has ended with another code than 0.
    """
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=f"{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        # One server imports torch and is forked for each rank: N imports would fight for the cores.
        start_method="forkserver",
        # The ranks finish their step after the signals below; the agent would kill them.
        signals_to_handle="SIGHUP",
    )
    logging.getLogger(AGENT_LOG).addFilter(tells_more_than_a_code)
    multiprocessing.set_forkserver_preload([entrypoint.__module__])
    told, held = multiprocessing.Pipe(duplex=False)
    with held, signals_noted() as asked:
        start_server_without_signals()
        elastic_launch(settings, entrypoint=entrypoint)(*arguments, asked, told)


def leave_with_launcher(told: Connection) -> None:
    """End this rank as soon as the launcher is gone, in the middle of whatever it does.

    The other end of the pipe is the launcher's alone and closes with it. A rank's parent is the
    fork server, which lives as long as its ranks, so the death of a parent tells nothing. A new
    start of the run may already be under way: nothing may be written any more.
    """

    def wait() -> None:
        with suppress(EOFError, OSError):
            told.recv_bytes()
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def tells_more_than_a_code(line: logging.LogRecord) -> bool:
    """Whether a line of the agent's log holds more than the code that `run_local_ranks` raises."""
    return not (line.exc_info and isinstance(line.exc_info[1], ProcessExitedException))


@contextmanager
def signals_noted() -> Iterator[ctypes.c_bool]:
    """Memory that is set by a request to stop: ranks see it whenever they begin to look."""
    asked = RawValue(ctypes.c_bool, False)

    def note(number: int, frame: FrameType | None) -> None:
        asked.value = True

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_server_without_signals() -> None:
    """Start the server with the signals held back, so that its ranks begin so too.

    Ctrl-C goes to all processes of a terminal: it would end those that are not listening yet.
    """
    resource_tracker.ensure_running()  # starting it lets two of the signals through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def place_from(environment: Mapping[str, str]) -> RankInfo | None:
    """Where the launcher has put this process; None if nobody has."""
    if "RANK" in environment:
        ranks = int(environment["WORLD_SIZE"])
        return RankInfo(
            rank=int(environment["RANK"]),
            num_ranks=ranks,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            ranks_per_node=int(environment.get("LOCAL_WORLD_SIZE", ranks)),
            rendezvous="env://",
        )
    # The step's own count: a job's SLURM_NTASKS is also set in its batch shell, outside any step.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return place_in_step(environment)
    return None


def place_in_step(environment: Mapping[str, str]) -> RankInfo:
    """One task of a SLURM step; the ranks meet on its first node, at a port of the job."""
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    # Below the ports that Linux gives to whoever asks for any (32768 and up).
    port = environment.get("MASTER_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 12000
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    ranks = int(environment["SLURM_STEP_NUM_TASKS"])
    return RankInfo(
        rank=int(environment["SLURM_PROCID"]),
        num_ranks=ranks,
        local_rank=int(environment["SLURM_LOCALID"]),
        ranks_per_node=int(per_node[0]) if per_node else ranks,
        rendezvous=f"tcp://{host}:{port}",
    )
