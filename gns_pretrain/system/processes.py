"""Being asked to stop: finish the step, save, leave with a code of its own."""

import ctypes
import os
import signal
from types import FrameType

# The cores that a process may use.


def available_cores() -> int:
    """Cores this process may use: a job's share, not the whole node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(processes: int) -> int:
    """Threads of each of several processes: OMP_NUM_THREADS, or its share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(available_cores() // processes, 1)


# A scheduler before it takes the machine away: SIGTERM (preemption), SIGUSR1 (slurm/train.sbatch),
# SIGUSR2 (submitit, whose own handler is replaced: the batch script requeues).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EXIT_STOPPED = 75  # the shell's EX_TEMPFAIL: nothing is wrong, start the same command again


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C; the loop looks at `requested` between steps.

    Args:
        of_launcher: memory shared with the launcher, which is set when that one was asked.
    """

    def __init__(self, of_launcher: ctypes.c_bool | None = None) -> None:
        self._noted = False
        self._of_launcher = of_launcher

    @property
    def requested(self) -> bool:
        """Whether somebody has asked."""
        return self._noted or (self._of_launcher is not None and self._of_launcher.value)

    def listen(self) -> None:
        """Take the signals from now on, and those that the launcher has had held back until now."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._noted = True
