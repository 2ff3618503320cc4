"""Where a process stands among its run's ranks, and starting ranks on this machine.

nothing set, launch.nproc_per_node=1    one process
nothing set, launch.nproc_per_node=N    this command starts N ranks on this machine
RANK set                                torchrun, or anything that sets its variables
a SLURM step of several tasks           srun or the SLURM launcher, with one task a GPU
"""

import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import c_bool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessExitedException

from gns_pretrain.errors import EXIT_ORPHANED
from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.system.processes import STOP_SIGNALS, StopRequest
from gns_pretrain.system.slurm import first_host

AGENT_LOG = "torch.distributed.elastic.multiprocessing.api"
SPAWN_LOG = "torch.multiprocessing.spawn"  # warns of each rank that is ended after another failed


def rank_info_from(environment: Mapping[str, str]) -> RankInfo | None:
    """This process's rank, if a launcher has set one."""
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
    ranks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if ranks == 1:
        return None
    # The ranks meet on the step's first node, at a port of the job: below those that Linux gives
    # to whoever asks for any (32768 and up).
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 12000
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return RankInfo(
        rank=int(environment["SLURM_PROCID"]),
        num_ranks=ranks,
        local_rank=int(environment["SLURM_LOCALID"]),
        ranks_per_node=int(per_node[0]) if per_node else ranks,
        rendezvous=f"tcp://{host}:{port}",
    )


def run_local_ranks(entrypoint: Callable[..., object], arguments: tuple[Any, ...], n: int) -> None:
    """Start n ranks through torch's elastic agent and wait for them.

    Args:
        entrypoint: a rank, called with `arguments`, the shared flag of a `StopRequest` and the
            pipe of `exit_with_launcher`.
        arguments: anything that can be pickled.
        n: ranks.

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
        # The ranks finish their step after a stop signal; the agent would kill them.
        signals_to_handle="SIGQUIT",
    )
    logging.getLogger(AGENT_LOG).addFilter(is_not_an_exit_code)
    logging.getLogger(SPAWN_LOG).setLevel(logging.ERROR)
    multiprocessing.set_forkserver_preload([entrypoint.__module__])
    pipe, our_end = multiprocessing.Pipe(duplex=False)
    with our_end, StopRequest(RawValue(c_bool, False)).listening() as stop:
        start_fork_server()
        elastic_launch(settings, entrypoint=entrypoint)(*arguments, stop.flag, pipe)


def exit_with_launcher(pipe: Connection) -> None:
    """End this rank, in the middle of whatever it does, as soon as its launcher is gone.

    The other end of the pipe is the launcher's alone and closes with it. A rank's parent is the
    fork server, which lives as long as its ranks, so the death of a parent says nothing. A new
    start of the run may already be under way: nothing may be written any more.
    """

    def wait() -> None:
        with suppress(EOFError, OSError):
            pipe.recv_bytes()
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def is_not_an_exit_code(line: logging.LogRecord) -> bool:
    """Filter of the agent's log: drop a rank's exit code, which ChildFailedError holds anyway."""
    return not (line.exc_info and isinstance(line.exc_info[1], ProcessExitedException))


def start_fork_server() -> None:
    """Start the fork server with the stop signals blocked, so that its ranks begin so too.

    Ctrl-C goes to all processes of a terminal: it would end those that are not listening yet.
    """
    resource_tracker.ensure_running()  # starting it unblocks two of the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
