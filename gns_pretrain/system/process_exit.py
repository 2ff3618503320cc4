"""How a process that was a rank ends: exit callbacks run, the interpreter is not finalized.

A gloo thread drops the tensors of a finished collective some time later, and takes the GIL for it.
While the interpreter finalizes, Python before 3.14 ends a thread that asks for the GIL with
pthread_exit; this unwinds into a C++ destructor, which may not throw: std::terminate, and exit code
-6 in place of the run's own.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_is_guarded = False  # `rank_process` has been entered
_has_threads = False  # a process group has been started, and its threads with it


@contextmanager
def rank_process() -> Iterator[None]:
    """Around the whole of a program that may join a process group.

    A process that has started a group ends with the block, with the code that Python would leave
    with; any other goes on as if the block were not there.
    """
    global _is_guarded
    _is_guarded = True
    code = 0
    try:
        yield
    except BaseException as error:
        if not _has_threads:
            raise
        code = _reported(error)
    if _has_threads:
        end_process(code)


def note_process_group(num_ranks: int) -> None:
    """Note that this process is about to start a process group."""
    global _has_threads
    # A child of the fork server leaves by os._exit in any case.
    assert num_ranks == 1 or _is_guarded or multiprocessing.parent_process() is not None, (
        "the program of a rank must run inside rank_process()"
    )
    _has_threads = True


def end_process(code: int) -> NoReturn:
    """Join threads, run exit callbacks and flush, in Python's order; then leave with `code`."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()  # logging, multiprocessing, temporary folders, W&B
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)  # what C++ has printed
    except BaseException as error:
        failure = _reported(error)
        code = code or failure
    finally:
        os._exit(code)


def _reported(error: BaseException) -> int:
    """The exit code that Python gives for an error, after printing what Python prints of it."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
