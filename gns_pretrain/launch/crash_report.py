"""One crash report a rank, so that the rank that failed is named first, not those it took along.

    <job folder>/start-<n>/rank_00003.json    rank, node, process; run_directory; and of a rank that
                                              failed: time, error, consequence
    <job folder>/start-<n>/rank_00003.stack   where the rank was when it crashed or got SIGTERM
    <run directory>/rank_00003.stack          the same without a job; gone if it ends by itself
    <run directory>/flight_record_rank_3      torch's flight record of its use of NCCL, when a
                                              collective has timed out; torchfrtrace compares them

When one rank dies, the others fail too, in the collective that it has left: their errors are
consequences. A rank that was killed from outside leaves no error at all.
"""

import contextlib
import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from gns_pretrain.errors import OneLineError
from gns_pretrain.parallel.mesh import NO_RENDEZVOUS
from gns_pretrain.runs.history import append_end
from gns_pretrain.system.files import write_json
from gns_pretrain.system.slurm import node_name
from gns_pretrain.system.terminal import write

# What gloo, NCCL and torch's store report when another rank is gone or silent (torch 2.11 to 2.13).
SIGNS_OF_ANOTHER_RANK = (
    NO_RENDEZVOUS,
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "Socket Timeout",
    "ncclRemoteError",
    "ncclSystemError",
    "remote process exited",
)
# How faulthandler begins a report of a crash.
CRASH = "Fatal Python error: "
FLIGHT_RECORD = "flight_record_rank_"  # begins a file's name; torch adds the rank
# Its path, by torch's name for it and the older one.
FLIGHT_RECORD_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
ABORTED = CRASH + "Aborted"
CRASHED, HANGING, WAITING = range(3)  # ranks without an error, likely culprits first
# A rank that only lost another one exits later: the launcher goes by the first exit code.
HEAD_START_SECONDS = 1.0


class CrashReporter:
    """Reports the failure of this rank: in its job's folder, in the run's history and in the log.

    Args:
        rank: this process.
        folder: `SlurmJob.folder`; None writes no files there.
        alone: no other rank was started, so no error can come from one.
    """

    def __init__(self, rank: int, folder: Path | None, *, alone: bool = False) -> None:
        self._alone = alone
        self._path = folder / f"rank_{rank:05d}.json" if folder else None
        self._values: dict[str, Any] = {"rank": rank, "node": node_name(), "process": os.getpid()}
        self._values["started"] = time.time()
        self._run_directory: Path | None = None
        self._stack: TextIO | None = None
        self._write()
        if self._path is not None:
            self._keep_stack(self._path.with_suffix(".stack"))

    def _keep_stack(self, path: Path) -> None:
        """Write where this process is when it crashes, or before it is killed.

        SLURM and torch's agent send SIGTERM to a rank that hangs before they kill it; Python's own
        handlers never run in a call that does not return.
        """
        self._stack = path.open("w")
        faulthandler.register(signal.SIGTERM, file=self._stack, all_threads=False, chain=True)
        # Crashes, and NCCL's watchdog, which aborts a rank that waits for another too long.
        faulthandler.enable(file=self._stack, all_threads=False)

    def set_run_directory(self, directory: Path) -> None:
        """Record failures in this run's history from now on, whose lock rank 0 holds, and let torch
        leave its flight record there; it reads the variable when a collective times out.
        """
        self._run_directory = directory
        self._values["run_directory"] = str(directory.resolve())
        self._write()
        if not any(os.environ.get(name) for name in FLIGHT_RECORD_VARIABLES):
            os.environ[FLIGHT_RECORD_VARIABLES[0]] = str(directory.resolve() / FLIGHT_RECORD)
        if self._stack is None and not self._alone:
            with contextlib.suppress(OSError):  # a full disk must not end a run for it
                self._keep_stack(directory / f"rank_{self._values['rank']:05d}.stack")

    def record_failure(self, error: Exception) -> None:
        """Write the report, once; print one line for a consequence of another rank's failure.

        Rank 0 also ends the run's history with it. A consequence is left to the batch script
        there, if one collects the reports.
        """
        if "error" in self._values:
            return
        follows = not self._alone and is_consequence(error)
        text = "".join(traceback.format_exception(error))
        self._values |= {"time": time.time(), "error": text, "consequence": follows}
        self._write()
        line = str(error)
        if not isinstance(error, OneLineError):
            line = f"{type(error).__name__}: {error}".splitlines()[0]
        if follows:
            line = f"another rank is gone or silent ({line})"
            write(f"rank {self._values['rank']}: {line}")
        if self._run_directory and self._values["rank"] == 0 and not (follows and self._path):
            with contextlib.suppress(OSError):  # of a full disk, which is the failure itself
                append_end(self._run_directory, "failed", line)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record an error that leaves the block.

        Raises:
            SystemExit: with code 1, in place of a consequence of another rank's failure.
        """
        try:
            yield
        except Exception as error:
            self.record_failure(error)
            if self._values["consequence"]:
                time.sleep(HEAD_START_SECONDS)
                raise SystemExit(1) from error
            raise

    def close(self) -> None:
        """Report nothing more, and ignore SIGTERM.

        The first rank that exits with a code makes srun end the others, which are exiting too:
        killed on the way, they would exit with another code.
        """
        if self._stack is not None:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._stack.close()
            if self._path is None:
                with contextlib.suppress(OSError):
                    Path(self._stack.name).unlink()

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._values)


def is_consequence(error: Exception) -> bool:
    """Whether an error only says that another rank is gone or silent."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in SIGNS_OF_ANOTHER_RANK
    )


def traces(directory: Path, *, since: float) -> str:
    """Name what ranks that hung or crashed since a time have left in a run directory, if any."""
    files = [*directory.glob("rank_*.stack"), *directory.glob(f"{FLIGHT_RECORD}*")]
    left = sorted(str(file) for file in files if is_newer(file, since))
    return f"where ranks were: {', '.join(left)}" if left else ""


def is_newer(file: Path, since: float) -> bool:
    status = file.stat()
    return status.st_size > 0 and status.st_mtime >= since


def remove_empty_stacks(directory: Path) -> None:
    """Remove the files of ranks that were killed before they could write anything."""
    for file in directory.glob("rank_*.stack"):
        if file.stat().st_size == 0:
            file.unlink()


@dataclass(frozen=True)
class CrashSummary:
    """The crash reports of a start, together."""

    ranks: int  # that wrote a report
    text: str  # for the job's log, the root cause first
    cause: str  # one line
    run_directory: Path | None


def read_crash_reports(folder: Path) -> CrashSummary:
    """Find the root cause of a failed start."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    causes = [rank for rank in ranks if rank.get("consequence") is False]
    silent = [rank for rank in ranks if "error" not in rank]
    directory = next((Path(r["run_directory"]) for r in ranks if "run_directory" in r), None)
    if causes:
        first = min(causes, key=lambda rank: rank["time"])
        body = first["error"].strip()
        cause = f"{_name(first)}: {body.splitlines()[-1]}"
    elif silent:
        cause, body = silent_failure(folder, silent)
    else:
        cause = "every rank lost the others" if ranks else "no rank came as far as to start a run"
        body = ""
    others = sum("error" in rank for rank in ranks) - bool(causes)
    lines = [cause, body, f"{others} more failed after it" if others else ""]
    if directory is not None:
        lines.append(traces(directory, since=min(rank.get("started", 0.0) for rank in ranks)))
    return CrashSummary(len(ranks), "\n".join(line for line in lines if line), cause, directory)


def silent_failure(folder: Path, silent: list[dict[str, Any]]) -> tuple[str, str]:
    """The cause in one line, and the stacks of ranks that left no error, likely culprits first.

    A rank that was aborted was waiting for another one, by NCCL's watchdog: not the culprit.
    """
    stacks: list[tuple[int, str, str]] = []  # order of suspicion, name, stack
    for rank in silent:
        path = folder / f"rank_{rank['rank']:05d}.stack"
        stack = path.read_text().strip() if path.exists() else ""  # empty if it was killed outright
        order = HANGING
        if stack.startswith(CRASH):
            order = WAITING if stack.startswith(ABORTED) else CRASHED
        stacks.append((order, _name(rank), stack))
    stacks.sort(key=itemgetter(0))
    first, name, stack = stacks[0]
    if first == CRASHED:
        cause = f"{name}: {stack.splitlines()[0]}"
    else:
        cause = (
            f"{', '.join(name for order, name, _ in stacks if order == first)} left no error: "
            "killed from outside, as when memory runs out, or hanging until the others gave up"
        )
    return cause, "\n".join(
        f"{name} was here at its end:\n{stack}" for _, name, stack in stacks if stack
    )


def _name(rank: dict[str, Any]) -> str:
    return f"rank {rank['rank']} (process {rank['process']} on {rank['node']})"
