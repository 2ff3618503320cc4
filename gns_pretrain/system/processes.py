"""The cores of a process, and the signals that ask it to stop."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A scheduler before it takes the machine away: SIGTERM (preemption), SIGUSR1 (slurm/train.sbatch),
# SIGUSR2 (submitit, whose own handler is replaced: the batch script requeues). And Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def available_cores() -> int:
    """Cores this process may use: a job's share, not the whole node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process(num_processes: int) -> int:
    """OMP_NUM_THREADS if it is set, or a process's share of the cores."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if text.isdecimal() and int(text) > 0:
        return int(text)
    return max(available_cores() // num_processes, 1)


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C, for a loop to look at `requested` between steps.

    Args:
        flag: memory shared with other processes, each of which may set it; None: this process's.
    """

    def __init__(self, flag: ctypes.c_bool | None = None) -> None:
        self.flag = ctypes.c_bool(False) if flag is None else flag
        self._noted = False

    @property
    def requested(self) -> bool:
        """Whether this process, or one that shares the flag, was asked to stop."""
        return self.flag.value

    def listen(self) -> None:
        """Handle the signals until this process ends, those blocked so far included.

        A second Ctrl-C interrupts at once.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._note_or_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals in this block."""
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = self.flag.value = True

    def _note_or_interrupt(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._note(number, frame)
