"""One start at a time in a run directory, on one machine and across machines.

On one machine flock decides, which the system releases when the holder dies, however. Some network
file systems keep such locks within a machine; there the holder's name in the lock file, and its
heartbeat, a new modification time every few seconds, show another machine that it is alive.
"""

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import LOCK
from gns_pretrain.system.slurm import SlurmJob, node_name

WAIT_SECONDS = 10.0  # other processes of a killed run take a moment to be gone
HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 4 * HEARTBEAT_SECONDS  # without a heartbeat, for a holder elsewhere


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock.

    Raises:
        InputError: another process holds it; names that process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with path.open("a+") as file:
        deadline = time.monotonic() + WAIT_SECONDS
        while (has_lock := try_flock(file.fileno())) is False:
            if time.monotonic() > deadline:
                raise in_use(directory, path.read_text())
            time.sleep(0.2)
        refuse_live_holder(directory, path, has_lock=has_lock is True)
        job = SlurmJob.current()
        of_job = f" (SLURM job {job.id})" if job else ""
        replace_text(file, f"process {os.getpid()} on {node_name()}{of_job}\n")
        done = threading.Event()
        heartbeat = threading.Thread(target=beat, args=(path, done), daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            done.set()
            heartbeat.join()
            replace_text(file, "")


def try_flock(descriptor: int) -> bool | None:
    """Take the lock if it is free; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def refuse_live_holder(directory: Path, path: Path, *, has_lock: bool) -> None:
    """Refuse if the file names a process that flock has not ruled out and that has a heartbeat.

    The file server's clock may differ from ours, so only a change of the modification time counts.

    Args:
        directory: the run's.
        path: the lock file.
        has_lock: flock is ours, so a holder on this machine is gone.
    """
    holder = path.read_text().strip()
    is_here = re.search(rf" on {re.escape(node_name())}(?= |$)", holder) is not None
    if not holder or (is_here and has_lock):
        return
    seen = path.stat().st_mtime_ns
    deadline = time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 5)
        with path.open():  # a network file system asks its server when a file is opened
            if path.stat().st_mtime_ns != seen:
                raise in_use(directory, holder)


def in_use(directory: Path, holder: str) -> InputError:
    """The error of a second start."""
    return InputError(
        f"{directory} is in use by {holder.strip() or 'another process'}; "
        "wait for it, stop it, or use another run_name"
    )


def beat(path: Path, done: threading.Event) -> None:
    """Touch the lock file until `done`; one that was removed is the run's own problem."""
    with suppress(OSError):
        while not done.wait(HEARTBEAT_SECONDS):
            os.utime(path)


def replace_text(file: TextIO, text: str) -> None:
    """Replace what the lock file holds."""
    file.truncate(0)
    file.write(text)
    file.flush()
