"""Where a process stands among its run's ranks, and starting ranks on this machine.

nothing set, launch.nproc_per_node=1    one process
nothing set, launch.nproc_per_node=N    this command starts N ranks on this machine
RANK set                                torchrun, or anything that sets its variables
a SLURM step of several tasks           srun or the SLURM launcher, with one task a GPU
a shell of such a step (srun --pty)     nothing set: whoever types here starts no other task
"""

import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import c_bool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessExitedException

from gns_pretrain.errors import EXIT_ORPHANED, InputError
from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.system.processes import STOP_SIGNALS, StopRequest
from gns_pretrain.system.slurm import first_host

# What launchers set for each rank, as far as it is needed.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
AGENT_LOG = "torch.distributed.elastic.multiprocessing.api"
SPAWN_LOG = "torch.multiprocessing.spawn"  # warns of each rank that is ended after another failed


def rank_info_from(environment: Mapping[str, str]) -> RankInfo | None:
    """This process's rank, if a launcher has set one.

    Raises:
        InputError: a launcher's variables are there in part, or are no numbers of a rank.
    """
    # The step's own count: a job's SLURM_NTASKS is also set in its batch shell, outside any step.
    tasks = number_in(environment, "SLURM_STEP_NUM_TASKS", at_least=1, default=1)
    # With a terminal task 0 has it, and may be a shell.
    has_terminal = "SLURM_PTY_PORT" in environment and environment.get("SLURM_PROCID") == "0"
    in_step = tasks > 1 and not (has_terminal and is_typed_in_a_shell())
    if "RANK" in environment or (environment.keys() & {"WORLD_SIZE", "LOCAL_RANK"} and not in_step):
        alone = environment.get("WORLD_SIZE") == "1"
        require(environment, TORCHRUN[:2] if alone else TORCHRUN)
        ranks = number_in(environment, "WORLD_SIZE", at_least=1)
        number_in(environment, "MASTER_PORT", below=2**16, default=0)
        return RankInfo(
            rank=number_in(environment, "RANK", below=ranks),
            num_ranks=ranks,
            local_rank=number_in(environment, "LOCAL_RANK", below=ranks, default=0),
            ranks_per_node=number_in(environment, "LOCAL_WORLD_SIZE", at_least=1, default=ranks),
            rendezvous="env://",
        )
    if not in_step:
        return None
    require(environment, SRUN)
    # The ranks meet on the step's first node, at a port of the job: below those that Linux gives
    # to whoever asks for any (32768 and up).
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = 20000 + number_in(environment, "SLURM_JOB_ID") % 12000
    port = number_in(environment, "MASTER_PORT", below=2**16, default=port)
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return RankInfo(
        rank=number_in(environment, "SLURM_PROCID", below=tasks),
        num_ranks=tasks,
        local_rank=number_in(environment, "SLURM_LOCALID", below=tasks),
        ranks_per_node=int(per_node[0]) if per_node else tasks,
        rendezvous=f"tcp://{host}:{port}",
    )


def require(environment: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse a launcher's variables of which some are missing."""
    if missing := [name for name in names if not environment.get(name)]:
        raise InputError(
            f"a launcher sets {', '.join(names)} together, but the environment has no "
            f"{' and no '.join(missing)}; start the command with torchrun or srun, or unset the "
            "others for a command that starts its own ranks"
        )


def number_in(
    environment: Mapping[str, str],
    name: str,
    *,
    at_least: int = 0,
    below: int | None = None,
    default: int | None = None,
) -> int:
    """A variable's number, or its default where it is not set; InputError if it is none."""
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < at_least or (below is not None and int(text) >= below):
        limit = "" if below is None else f" below {below}"
        raise InputError(
            f"{name}={text} in the environment is not a number from {at_least}{limit}; start the "
            "command with torchrun or srun, or unset it"
        )
    return int(text)


def is_typed_in_a_shell() -> bool:
    """Whether job control has given this command a process group of its own in its terminal.

    In a step with a terminal this tells a shell's command from a task that srun has started.
    """
    return os.getpgrp() != os.getsid(0)


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
