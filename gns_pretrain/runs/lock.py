"""That only one start of a run writes to its folder, on one machine and across machines.

On one machine the system's lock decides, and lets go when its holder ends, however. Some network
file systems keep such locks within a machine; there the holder's name in the lock file and its
beat, a new modification time every few seconds, tell another machine that it is alive.
"""

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gns_pretrain.errors import InputError
from gns_pretrain.system.slurm import Job, node_name

LOCK = ".lock"
PATIENCE_SECONDS = 10.0  # a killed run's other processes take a moment to be gone
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 4 * BEAT_SECONDS  # a holder on another machine that is this quiet is gone


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the folder against a second start.

    Raises:
        InputError: somebody else holds it, and is named.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with path.open("a+") as file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (held := try_lock(file.fileno())) is False:
            if time.monotonic() > deadline:
                raise in_use(directory, path.read_text())
            time.sleep(0.2)
        refuse_live_holder(directory, path, lock_tells=held is True)
        rewrite(file, f"process {os.getpid()} on {node_name()}{of_job()}\n")
        done = threading.Event()
        beat = threading.Thread(target=keep_beating, args=(path, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            rewrite(file, "")


def refuse_live_holder(directory: Path, path: Path, *, lock_tells: bool) -> None:
    """Refuse if the file names a process that no lock has ruled out, and its beat goes on.

    Our clock and the file server's may differ, so only a change of the time tells.

    Args:
        lock_tells: this machine's lock is ours, so a holder on this machine is gone.
    """
    holder = path.read_text().strip()
    is_here = re.search(rf" on {re.escape(node_name())}(?= |$)", holder) is not None
    if not holder or (is_here and lock_tells):
        return
    seen = path.stat().st_mtime_ns
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        with path.open():  # a network file system asks its server when a file is opened
            if path.stat().st_mtime_ns != seen:
                raise in_use(directory, holder)


def in_use(directory: Path, holder: str) -> InputError:
    """The refusal."""
    return InputError(
        f"{directory} is in use by {holder.strip() or 'another process'}; "
        "wait for it, stop it, or use another run_name"
    )


def of_job() -> str:
    """The SLURM job of this process, as part of its name."""
    job = Job.current()
    return f" (SLURM job {job.id})" if job else ""


def keep_beating(path: Path, done: threading.Event) -> None:
    """Touch the file until told to end; a folder that was removed is the run's own problem."""
    while not done.wait(BEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:
            return


def rewrite(file: TextIO, text: str) -> None:
    """Put a text in place of what the file holds."""
    file.truncate(0)
    file.write(text)
    file.flush()


def try_lock(descriptor: int) -> bool | None:
    """Take the lock if nobody has it; None on a file system without locks, where the beat tells."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
