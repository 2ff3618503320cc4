"""The ranks' last words, so that the one that failed is told first and not the ones it took along.

<job folder>/start-<n>/rank_00003.json    rank, node, process; run_directory (of rank 0); and at
                                          the end of a rank that failed: time, error, consequence
<job folder>/start-<n>/rank_00003.stack   where the rank stood when it crashed or was told to end

When one rank dies, the others fail too, in the collective that it has left: these errors are its
consequences. A rank that was killed from outside leaves no word at all.
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
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.runs.history import note_end
from gns_pretrain.system.files import write_json
from gns_pretrain.system.slurm import Job, node_name

# What gloo, NCCL and torch's store say when another rank is gone or silent.
SIGNS_OF_ANOTHER = (
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
# How faulthandler begins what it writes of a crash.
CRASH = "Fatal Python error: "
ABORTED = CRASH + "Aborted"
# A rank that only lost another one leaves later: whoever started them goes by the first code.
HEAD_START_SECONDS = 1.0


class LastWords:
    """One rank's file in the folder of its job's start; without a folder nothing is written.

    Args:
        rank: this process.
        folder: from `Job.folder`.
        alone: no other rank was started, so no error can come from one.
    """

    def __init__(self, rank: int, folder: Path | None, *, alone: bool = False) -> None:
        self._alone = alone
        self._path = folder / f"rank_{rank:05d}.json" if folder else None
        self._values: dict[str, Any] = {"rank": rank, "node": node_name(), "process": os.getpid()}
        self._write()
        if self._path is not None:
            # SLURM asks a rank that hangs to end before it kills it; Python itself would not
            # notice in a call that never comes back.
            self._stack = self._path.with_suffix(".stack").open("w")
            faulthandler.register(signal.SIGTERM, file=self._stack, all_threads=False, chain=True)
            # Crashes, and NCCL's watchdog, which aborts a rank that waits for another too long.
            faulthandler.enable(file=self._stack, all_threads=False)

    def know(self, directory: Path) -> None:
        """Note the run's folder, for the report."""
        self._values["run_directory"] = str(directory.resolve())
        self._write()

    def close(self) -> None:
        """From here on nothing is told, and a request to end changes nothing.

        The first rank that leaves with a code makes srun end the others, which are leaving too:
        killed on the way, they would leave another code.
        """
        if self._path is not None:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._stack.close()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write down an error that leaves the block; the innermost block's counts.

        Raises:
            SystemExit: with code 1 after one line, in place of a consequence of another rank's end.
        """
        try:
            yield
        except Exception as error:
            if "error" in self._values:
                raise
            text = "".join(traceback.format_exception(error))
            follows = self._follows(error)
            self._values |= {"time": time.time(), "error": text, "consequence": follows}
            self._write()
            if follows:
                print(f"rank {self._values['rank']}: {in_one_line(error, follows=True)}")
                time.sleep(HEAD_START_SECONDS)
                raise SystemExit(1) from error
            raise

    @contextlib.contextmanager
    def noted(self, directory: Path) -> Iterator[None]:
        """Note in the run's folder that it failed, on the main rank; the caller holds the folder.

        What only follows another rank's end is left to the batch script, if one gathers the words.
        """
        try:
            yield
        except Exception as error:
            follows = self._follows(error)
            if self._values["rank"] == 0 and not (follows and self._path):
                with contextlib.suppress(OSError):  # of a full disk, which is the failure itself
                    note_end(directory, "failed", in_one_line(error, follows=follows))
            raise

    def _follows(self, error: Exception) -> bool:
        return not self._alone and is_consequence(error)

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._values)


def is_consequence(error: Exception) -> bool:
    """Whether an error only says that another rank is gone or silent."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_ANOTHER)


def in_one_line(error: Exception, *, follows: bool) -> str:
    """An error for people; `follows`: it is a consequence of another rank's end."""
    if isinstance(error, InputError | TrainingError):
        return str(error)
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"another rank is gone or silent ({line})" if follows else line


@dataclass(frozen=True)
class Report:
    """What the ranks of a start left."""

    ranks: int  # that came as far as to leave a word
    text: str  # for the job's log, the cause first
    cause: str  # one line
    run_directory: Path | None


def read_words(folder: Path) -> Report:
    """The words of a start that failed, the cause first."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    own = [word for word in ranks if word.get("consequence") is False]
    silent = [word for word in ranks if "error" not in word]
    directory = next((Path(w["run_directory"]) for w in ranks if "run_directory" in w), None)
    if own:
        first = min(own, key=lambda word: word["time"])
        cause = f"{_name(first)}: {_last_line(first['error'])}"
        body = first["error"].rstrip()
    elif silent:
        cause, body = silent_end(folder, silent)
    else:
        cause = "every rank lost the others" if ranks else "no rank came as far as to start a run"
        body = ""
    others = sum("error" in word for word in ranks) - bool(own)
    lines = [cause, body, f"{others} more failed after it" if others else ""]
    return Report(len(ranks), "\n".join(line for line in lines if line), cause, directory)


def silent_end(folder: Path, silent: list[dict[str, Any]]) -> tuple[str, str]:
    """One line on the ranks that left no error, and where they stood; the likely culprits first.

    A rank that was aborted was waiting for another one, by NCCL's watchdog: not the culprit.
    """
    stacks = {word["rank"]: stack_of(folder, word) for word in silent}
    crashed = [word for word in silent if stacks[word["rank"]].startswith(CRASH)]
    waiting = [word for word in crashed if stacks[word["rank"]].startswith(ABORTED)]
    crashed = [word for word in crashed if word not in waiting]
    others = [word for word in silent if word not in crashed + waiting]
    if crashed:
        why = stacks[crashed[0]["rank"]].splitlines()[0]
        cause = f"{_name(crashed[0])}: {why}"
    else:
        cause = (
            f"{_names(others or waiting)} left no error: killed from outside, as when memory runs "
            "out, or hanging until the others gave up"
        )
    told = [
        f"{_name(word)} stood here at its end:\n{stacks[word['rank']]}"
        for word in (*crashed, *others, *waiting)
        if stacks[word["rank"]]
    ]
    return cause, "\n".join(told)


def stack_of(folder: Path, word: dict[str, Any]) -> str:
    """Where a silent rank stood at its end; empty if it was killed outright."""
    path = folder / f"rank_{word['rank']:05d}.stack"
    return path.read_text().strip() if path.exists() else ""


def current_words(rank: int, num_ranks: int) -> LastWords:
    """The words of this process."""
    job = Job.current()
    return LastWords(rank, job.folder if job else None, alone=num_ranks == 1)


def _name(word: dict[str, Any]) -> str:
    return f"rank {word['rank']} (process {word['process']} on {word['node']})"


def _names(words: list[dict[str, Any]]) -> str:
    return ", ".join(_name(word) for word in words)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
