"""Commands in this process: how they end, and what they print."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from gns_pretrain import commands
from gns_pretrain.errors import OneLineError, print_error
from gns_pretrain.system import processes

MOST_SECONDS = 60.0  # for a command: one that waits for a pipe would wait for ever
CODES = (0, 1, 2, 3, 75)  # 1: a replay took another path


@dataclass
class Ended:
    """How a command ended."""

    code: object
    out: str
    lines: list[str] = field(default_factory=list)  # of standard error

    @property
    def problem(self) -> str:
        """What is wrong with that, empty if nothing is."""
        if self.code not in CODES or (self.code == 1 and self.lines):
            return f"code {self.code}: {self.lines[-3:]}"
        if self.code in (2, 3) and sum(line.startswith("error: ") for line in self.lines) != 1:
            return f"code {self.code} without one line: {self.lines}"
        return ""

    def problem_beside(self, name: str) -> str:
        """The same for a command about several runs, which must show the run `name`.

        Settings that somebody may have typed are no damage: such runs are not mixed.
        """
        typed = ("have different settings", "have several scales")
        if self.code == 2 and any(text in line for text in typed for line in self.lines):
            return self.problem
        if self.code != 0 or name not in self.out:
            return f"code {self.code}, {name} is not shown: {self.lines}"
        return self.problem


def ended(call: Callable[[], object]) -> Ended:
    """Call a command's function in this process."""
    # What other tests have left would make the command end the process that it runs in.
    processes._has_threads = processes._has_abandoned = False

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = call()
    except SystemExit as error:
        code = error.code
    except OneLineError as error:
        with contextlib.redirect_stderr(err):
            code = print_error(error)
    except Exception as error:
        code = repr(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return Ended(code, out.getvalue(), err.getvalue().splitlines())


def command(*words: object) -> Ended:
    """`gns-pretrain WORDS`."""
    sys.argv = [str(word) for word in words]
    return ended(lambda: commands.run_command(str(words[0])))
