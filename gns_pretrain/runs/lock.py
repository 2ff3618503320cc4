"""One start at a time in a run directory, on one machine and across machines.

On one machine flock decides, which the system releases when the holder dies, however. It is taken
on the lock file and on the directory, since a file can be removed and made anew. Some network file
systems keep such locks within a machine; there the holder's name in the lock file, and its
heartbeat, a new modification time every few seconds, show another machine that it is alive.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import LOCK, METRICS, STARTS
from gns_pretrain.system.files import open_regular, take_flock
from gns_pretrain.system.slurm import SlurmJob, node_name

WAIT_SECONDS = 10.0  # other processes of a killed run take a moment to be gone
HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 4 * HEARTBEAT_SECONDS  # without a heartbeat, for a holder elsewhere


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; InputError names the process that holds it."""
    refuse_links(directory)
    path = directory / LOCK
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a+"))
        folder = os.open(directory, os.O_RDONLY)
        stack.callback(os.close, folder)
        deadline = time.monotonic() + WAIT_SECONDS
        while False in (
            has_lock := take_flock(file.fileno(), wait=False),
            take_flock(folder, wait=False),
        ):
            if time.monotonic() > deadline:
                raise in_use(path)
            time.sleep(0.2)
        refuse_live_holder(path, has_lock=has_lock is True)
        job = SlurmJob.current()
        of_job = f" (SLURM job {job.id})" if job else ""
        name = f"process {os.getpid()} on {node_name()}{of_job}\n"
        file.truncate(0)
        file.write(name)
        file.flush()
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):  # of a folder that was moved, which the record will notice
                    try:
                        os.utime(path)
                    except FileNotFoundError:  # removed by hand
                        path.write_text(name)

        heartbeat = threading.Thread(target=beat, daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            done.set()
            heartbeat.join()
            file.truncate(0)


def holder_in(path: Path) -> str:
    """The name in a lock file, empty where there is none."""
    try:
        with open_regular(path) as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def refuse_links(directory: Path) -> None:
    """Refuse a run directory in which what a run appends to is a link, a folder or a pipe."""
    for path in (directory / name for name in (LOCK, METRICS, STARTS)):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link, and the run would write where it leads; remove it, or use "
                "another run_name"
            )
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file; remove it, or use another run_name")


def refuse_live_holder(path: Path, *, has_lock: bool) -> None:
    """Refuse if the file names a process that flock has not ruled out and that has a heartbeat.

    The file server's clock may differ from ours, so only a change of the modification time counts.
    With `has_lock`, flock is ours, so a holder on this machine is gone.
    """
    holder = holder_in(path)
    is_here = re.search(rf" on {re.escape(node_name())}(?= |$)", holder) is not None
    if not holder or (is_here and has_lock):
        return
    seen = path.stat().st_mtime_ns
    deadline = time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 5)
        with path.open():  # a network file system asks its server when a file is opened
            if path.stat().st_mtime_ns != seen:
                raise in_use(path)


def in_use(path: Path) -> InputError:
    """The error of a second start, which names the holder of the lock file."""
    return InputError(
        f"{path.parent} is in use by {holder_in(path) or 'another process'}; "
        "wait for it, stop it, or use another run_name"
    )
