"""Being asked to stop: finish the step, save, leave with a code of its own."""

import os
import signal
from types import FrameType

# A scheduler before it takes the machine away: SIGTERM (preemption), SIGUSR1 (slurm/train.sbatch),
# SIGUSR2 (submitit, whose own handler is replaced: the batch script requeues).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EXIT_STOPPED = 75  # the shell's EX_TEMPFAIL: nothing is wrong, start the same command again


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C; the loop looks at `requested` between steps."""

    def __init__(self) -> None:
        self.requested = False
        self._parent = os.getppid()

    def listen(self) -> None:
        """Take the signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and os.getppid() != self._parent:
            # The launcher was killed, and torch sends its orphans this signal; a new start of
            # the run may already be under way, so nothing may be written any more.
            os._exit(130)
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
