"""The failures that end a command with one line instead of a traceback, and its exit codes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

EXIT_FINISHED = 0
EXIT_CRASHED = 1  # a traceback, or a process that was killed
EXIT_BAD_INPUT = 2  # a setting or a file that the user can mend
EXIT_TRAINING = 3  # the run cannot continue: a loss that is not finite, a full disk
EXIT_STOPPED = 75  # the shell's EX_TEMPFAIL: saved after a signal, start the same command again
EXIT_ORPHANED = 130  # a rank whose launcher is gone


class OneLineError(Exception):
    """A failure that one line explains.

    Args:
        message: the line.
        on_all_ranks: every rank raises it, so rank 0 prints it for all.
    """

    exit_code: ClassVar[int]

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class InputError(OneLineError, ValueError):
    """A setting or a file that the user can mend.

    The message is one line that names the setting or file, its value, the rule and a hint.
    """

    exit_code = EXIT_BAD_INPUT


class DamagedFileError(InputError):
    """A file of ours that cannot be read, or holds what nobody has written there.

    What reads many runs catches it, names the file and reads the others.
    """


class TrainingError(OneLineError, RuntimeError):
    """A run that cannot continue (a loss that is not finite, a full disk).

    The message names the step and what is still good; nothing that was saved is lost.
    """

    exit_code = EXIT_TRAINING


class DivergedError(TrainingError):
    """A loss or gradient that no update can be made of; all ranks raise it.

    Where the run has a checkpoint, the command adds how to go on from it.
    """


def print_error(error: OneLineError, *, rank: int = 0, num_ranks: int = 1) -> int:
    """Print the line to stderr, once for an error of all ranks; return the exit code."""
    line = printable(str(error)).replace("\n", "\\n")  # one line, whatever it quotes
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "\x1b[31merror:\x1b[0m" if red else "error:"
    if num_ranks > 1 and not error.on_all_ranks:
        print(f"{label} rank {rank}: {line}", file=sys.stderr)
    elif rank == 0:
        print(f"{label} {line}", file=sys.stderr)
    return error.exit_code


def printable(text: str) -> str:
    """Escape what a terminal would obey or hide, such as \\x1b; line breaks stay."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 run, 2,000 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, or its class's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def needs(extra: str, sentence: str) -> Iterator[None]:
    """Import optional packages within; a missing one is an InputError that names its extra.

    Args:
        extra: of this package, in pyproject.toml.
        sentence: what needs which package.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{sentence}; pip install 'gns-pretrain[{extra}]'") from error
