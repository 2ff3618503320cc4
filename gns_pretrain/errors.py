"""The two kinds of failure that end a run with one line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class OneLineError(Exception):
    """What both have in common.

    Args:
        message: the line.
        on_all_ranks: every rank raises it, so the main one tells it for all.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class InputError(OneLineError, ValueError):
    """A setting or a file that people can mend; the command ends with exit code 2.

    The message is one line that names the setting or file, its value, the rule and the way out.
    """


class TrainingError(OneLineError, RuntimeError):
    """A run that cannot go on (a loss that is not finite, a full disk); exit code 3.

    The message names the step and what is still good; nothing that was saved is lost.
    """


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
