"""One start at a time in a run directory, on one machine and across machines.

On one machine flock decides, which the system releases when the holder dies, however. Some network
file systems keep such locks within a machine; there the holder's name in the lock file, and its
heartbeat, a new modification time every few seconds, show another machine that it is alive.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import LOCK
from gns_pretrain.system.files import take_flock
from gns_pretrain.system.slurm import SlurmJob, node_name

WAIT_SECONDS = 10.0  # other processes of a killed run take a moment to be gone
HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 4 * HEARTBEAT_SECONDS  # without a heartbeat, for a holder elsewhere


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; InputError names the process that holds it."""
    path = directory / LOCK
    with path.open("a+") as file:
        deadline = time.monotonic() + WAIT_SECONDS
        while (has_lock := take_flock(file.fileno(), wait=False)) is False:
            if time.monotonic() > deadline:
                raise in_use(path)
            time.sleep(0.2)
        refuse_live_holder(path, has_lock=has_lock is True)
        job = SlurmJob.current()
        of_job = f" (SLURM job {job.id})" if job else ""
        file.truncate(0)
        file.write(f"process {os.getpid()} on {node_name()}{of_job}\n")
        file.flush()
        done = threading.Event()

        def beat() -> None:
            with suppress(OSError):  # a lock file that was removed is the run's own problem
                while not done.wait(HEARTBEAT_SECONDS):
                    os.utime(path)

        heartbeat = threading.Thread(target=beat, daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            done.set()
            heartbeat.join()
            file.truncate(0)


def refuse_live_holder(path: Path, *, has_lock: bool) -> None:
    """Refuse if the file names a process that flock has not ruled out and that has a heartbeat.

    The file server's clock may differ from ours, so only a change of the modification time counts.
    With `has_lock`, flock is ours, so a holder on this machine is gone.
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
                raise in_use(path)


def in_use(path: Path) -> InputError:
    """The error of a second start, which names the holder of the lock file."""
    return InputError(
        f"{path.parent} is in use by {path.read_text().strip() or 'another process'}; "
        "wait for it, stop it, or use another run_name"
    )
