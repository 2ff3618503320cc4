"""Standard output and error that may go away: a pipe that nobody reads, a full disk, a terminal."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast


class SurvivingStream:
    """A text stream whose first error sends the rest of it to nowhere, after a line elsewhere.

    Args:
        name: of the stream, for that line.
        stream: what it is.
        log: prints the line.
    """

    def __init__(self, name: str, stream: TextIO, log: Callable[[str], None]) -> None:
        self._name = name
        self._stream = stream
        self._log = log

    def write(self, text: str) -> int:
        """Write, or drop, a text; return its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there, too
            os.close(nowhere)
            self._log(f"{self._name} is lost ({error.strerror}); the command goes on")


def outlive_output(*, logs: bool) -> None:
    """Let this process go on where its output cannot be written any more.

    Args:
        logs: whether standard error says so; a command that only prints ends silently.
    """

    def log(line: str) -> None:
        if logs:
            print(line, file=sys.stderr)

    def drop(line: str) -> None:
        """Say nothing: there is no other place."""

    if sys.stdout is not None:  # a process may have no streams at all
        sys.stdout = cast(TextIO, SurvivingStream("standard output", sys.stdout, log))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, SurvivingStream("standard error", sys.stderr, drop))
