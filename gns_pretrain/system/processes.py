"""Processes: cores, starting one of this package, signals to stop, how one that was a rank ends.

A gloo thread drops the tensors of a finished collective some time later, and takes the GIL for it.
While the interpreter finalizes, Python before 3.14 ends a thread that asks for the GIL with
pthread_exit; this unwinds into a C++ destructor, which may not throw: std::terminate, and exit code
-6 instead of the run's own. A process that was a rank therefore runs its exit callbacks and leaves
without finalizing the interpreter.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn, TypeVar

# A scheduler before it takes the machine away: SIGTERM (preemption), SIGUSR1 (slurm/train.sbatch),
# SIGUSR2 (submitit, whose own handler is replaced: the batch script requeues). Ctrl-C, and SIGHUP,
# which comes with the end of a terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
T = TypeVar("T")


CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")


def available_cores() -> int:
    """Cores this process may use: a job's share, not the whole node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container that this process is in, has."""
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control groups, or "max"
        num_bytes = min(num_bytes, int(CONTAINER_MEMORY.read_text()))
    return num_bytes


def threads_per_process(num_processes: int) -> int:
    """OMP_NUM_THREADS if it is set, or a process's share of the cores."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if text.isdecimal() and int(text) > 0:
        return int(text)
    return max(available_cores() // num_processes, 1)


PACKAGE_ROOT = Path(__file__).resolve().parents[2]  # of a checkout, or site-packages


def python_command(module: str, *words: str) -> list[str]:
    """`python -m MODULE ...` of this package, in `python_environment()`.

    -P: not a folder of the same name where the command happens to be typed.
    """
    return [sys.executable, "-P", "-m", module, *words]


def python_environment() -> dict[str, str]:
    """The environment, with a PYTHONPATH by which Python finds this package where it is now."""
    if str(PACKAGE_ROOT) == sysconfig.get_path("purelib"):
        return dict(os.environ)
    path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def handled_signals() -> list[signal.Signals]:
    """The stop signals, without a SIGHUP that nohup has told the command to ignore."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]


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
        for number in handled_signals():
            signal.signal(number, self._note_or_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals in this block."""
        before = {number: signal.signal(number, self._note) for number in handled_signals()}
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


class Worker:
    """Threads that make calls in order, so that none can hold its caller for ever.

    Args:
        num_threads: calls that are made at a time.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self._last: Future | None = None
        self._calls: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self.threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether the last call has not returned, so that another one would wait for it."""
        return self._last is not None and not self._last.done()

    def call(self, action: Callable[[], T], seconds: float) -> T:
        """Return the call's result, or raise its error; TimeoutError if it takes longer."""
        return result_of(self.start(action), seconds)

    def start(self, action: Callable[[], T]) -> Future[T]:
        """Make the call beside what its caller does next."""
        future: Future[T] = Future()
        self._calls.put((future, action))
        self._last = future
        return future

    def end(self) -> None:
        """End the threads after the calls so far."""
        for _ in self.threads:
            self._calls.put(None)

    def stop_at_exit(self) -> None:
        """Let this process end without the calls that have not begun.

        A rank leaves from the midst of the others. Any other process waits for those: a thread that
        returns from C++ to an interpreter that is gone aborts the process.
        """
        global _has_threads
        _has_threads = True
        atexit.register(self._stop)

    def _stop(self) -> None:
        if _is_leaving:
            return
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        self.end()
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            self._make(*given)
            del given  # while the thread waits, nothing that the call held

    @staticmethod
    def _make(future: Future[T], action: Callable[[], T]) -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)


def result_of(future: Future[T], seconds: float | None = None) -> T:
    """Wait for a `Worker`'s call; return its result, or raise its error.

    A call that takes longer (TimeoutError), or whose caller is interrupted, is abandoned where it
    is: this process will leave without the exit callbacks that might wait for it.
    """
    global _has_abandoned
    try:
        wait([future], seconds)
    finally:
        _has_abandoned |= not future.done()
    if not future.done():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return future.result()


_has_abandoned = False  # a call of a `Worker` has not returned
_is_guarded = False  # `rank_process` has been entered
_has_threads = False  # some have been started that may not outlive the interpreter
_is_leaving = False  # by `end_process`


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
        if not (_has_threads or _has_abandoned):
            raise
        code = _reported(error)
    if _has_threads or _has_abandoned:
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
    global _is_leaving
    _is_leaving = True
    try:
        if not _has_abandoned:
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
