"""Views of the run record: what a view is, the series it plots, and TensorBoard's."""

import io
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gns_pretrain.errors import OneLineError, one_line
from gns_pretrain.system.processes import Worker
from gns_pretrain.tracking.jsonl import READ_AT, written_at
from gns_pretrain.tracking.unit import TOKENS, Unit

T = TypeVar("T")

AXES = ("step", "tokens", "samples")
_PREFIXES = {"train": "train", "validation": "val", "batch_size": "batch_size"}
_FLUSH_SECONDS = 30
WAIT_SECONDS = 90.0  # W&B's own limits are below
CLOSE_SECONDS = 10.0  # for a view that has failed
MAX_QUOTED = 300  # letters of a failure's cause
MAX_LOSS = 700.0  # nats a token, whose perplexity is still a float64


def as_shown(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as views take it: they go forward, so what was read later than it
    was measured is shown where it was read.
    """
    shown = record | {"step": written_at(record)}
    shown.pop(READ_AT, None)
    return shown


def axes(record: dict[str, Any]) -> dict[str, int]:
    """Return the positions a record carries, each usable as an x-axis: trainer/step and so on."""
    return {f"trainer/{axis}": record[axis] for axis in AXES if axis in record}


def series(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers a record carries, by series: train/loss, val/loss, batch_size/to,
    noise/<geometry>/<estimate>/noise_scale, shadow/<policy>/to and so on.

    Two follow from others: val/perplexity, and train/batch_tokens, the tokens of the step. Names
    and undefined values (null) are left out.
    """
    derived: dict[str, float] = {}
    kind = record["kind"]
    if kind == "shadow":
        prefix = f"shadow/{record['policy']}"
    else:
        prefix = _PREFIXES.get(kind) or f"{kind}/{record['geometry']}/{record['estimate']}"
    loss, samples = record.get("loss"), record.get("samples")  # earlier versions lack some
    if kind == "validation" and loss is not None and loss < MAX_LOSS:
        derived["perplexity"] = math.exp(loss)
    if kind == "train" and samples and {"batch_size", "tokens"} <= record.keys():
        derived["batch_tokens"] = record["batch_size"] * record["tokens"] // samples
    return {
        f"{prefix}/{name}": value
        for name, value in (record | derived).items()
        if name not in AXES and isinstance(value, int | float)
    }


class View(Protocol):
    """Shows records somewhere."""

    def write(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl; an undefined number is None."""

    def sync(self) -> None:
        """Keep what was shown so far, even if this process is killed: a checkpoint comes."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the finished run's summary."""

    def close(self, error: str = "") -> None:
        """Release files and processes; also after finish(), or an error that ended the run."""


class MayFail:
    """A view that cannot stop training: its first failure is logged in one line, and ends it.

    Its calls are made in a thread of their own, one after the other. One that does not return in
    time counts as failed and is left behind.

    Args:
        name: names the view in that line.
        open_view: makes the view; may fail as well.
        log: prints a line.
        fill_in: at the run's end, given its summary, shows all of it in place of a view that has
            failed; one more failure is another line.
        wait_seconds: longest wait for one call.
    """

    def __init__(
        self,
        name: str,
        open_view: Callable[[], View],
        log: Callable[[str], None],
        *,
        fill_in: Callable[[dict[str, Any]], None] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._name = name
        self._log = log
        self._fill_in = fill_in
        self._wait_seconds = wait_seconds
        self._worker = Worker()
        self.failure: str | None = None
        self._view: View | None = None
        self._view = self._attempt(open_view)

    def write(self, record: dict[str, Any]) -> None:
        """Show one line, unless the view has failed."""
        if self._view is not None:
            self._attempt(partial(self._view.write, record))

    def sync(self) -> None:
        """Keep what was shown so far, unless the view has failed."""
        if self._view is not None:
            self._attempt(self._view.sync)

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the summary; a view that has failed is filled in."""
        if self._view is not None:
            self._attempt(partial(self._view.finish, summary))
        if self.failure is not None and self._fill_in is not None:
            self._worker = Worker()  # the other may wait for ever
            try:
                self._worker.call(partial(self._fill_in, summary), WAIT_SECONDS + CLOSE_SECONDS)
                self._log(f"{self._name} has been filled in from metrics.jsonl")
            except OneLineError as error:
                self._log(f"{self._name} has not been filled in: {error}")
            except (Exception, SystemExit) as error:
                self._log(f"{self._name} has not been filled in ({cause(error)})")

    def close(self, error: str = "") -> None:
        """Close the view, unless it has failed."""
        if self._view is not None:
            self._attempt(partial(self._view.close, error))
        self._worker.end()

    def _attempt(self, action: Callable[[], T]) -> T | None:
        try:
            return self._worker.call(action, self._wait_seconds)
        except (Exception, SystemExit) as error:
            failed, self._view = self._view, None
            if failed is not None and not self._worker.is_busy:
                with suppress(Exception, SystemExit):
                    self._worker.call(failed.close, CLOSE_SECONDS)
            self.failure = cause(error)
            if isinstance(error, ImportError):
                self.failure += "; pip install 'gns-pretrain[tracking]'"
                self._fill_in = None
            self._log(
                f"{self._name} failed and is left out from here on, metrics.jsonl has everything "
                f"({self.failure})"
            )
            return None


def cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)[:MAX_QUOTED]}"


# TensorBoard sorts by name: the losses come first.
_TENSORBOARD_GROUPS = {
    "train/loss": "loss/train",
    "val/loss": "loss/validation",
    "val/perplexity": "perplexity/validation",
}
_TENSORBOARD_RESULTS = ("loss/validation", "perplexity/validation", "loss/train", "train/step")


class TensorboardView:
    """Every series over tokens, in an event file of the run directory, whose name is the run's.

    What TensorBoard calls the step is the number of tokens, or of images, since the batch size
    changes and two runs compare at equal numbers; train/step has the optimizer steps. A line
    without such a number stands where the one before does.

    Records are written in the calling thread: torch's SummaryWriter has one of its own, which
    prints the traceback of a full disk and may not tell its caller.

    Args:
        unit: of the axis.
        resume_from: as many of it; 0 is a run that starts. Points beyond, left by a killed process,
            are hidden from TensorBoard.
        hparams: settings for its table of runs, beside the last values of the results.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        resume_from: int,
        hparams: Mapping[str, Any],
        unit: Unit = TOKENS,
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import RecordWriter
        from torch.utils.tensorboard import summary as summaries

        self._event, self._scalar = Event, summaries.scalar
        self._pending = io.BytesIO()
        self._records = RecordWriter(self._pending)
        self._unit, self._position = unit, resume_from
        # TensorBoard reads a folder's files in the order of their names.
        self._path = run_directory / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        self._path.touch(exist_ok=False)
        self._add(file_version="brain.Event:2")
        hidden_from = resume_from + 1 if resume_from > 0 else 0
        self._add(step=hidden_from, session_log=SessionLog(status=SessionLog.START))
        shown = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in hparams.items()
        }
        *at_start, self._at_end = summaries.hparams(shown, dict.fromkeys(_TENSORBOARD_RESULTS, 0))
        for summary in at_start if shown else ():
            self._add(summary=summary)
        self._flush()

    def write(self, record: dict[str, Any]) -> None:
        """Plot a record's numbers at its tokens or images."""
        self._position = record.get(self._unit.name, self._position)
        numbers = series(record)
        if record["kind"] == "train":
            numbers["train/step"] = record["step"]
        for name, value in numbers.items():
            tag = _TENSORBOARD_GROUPS.get(name, name).replace("batch_size/", "policy/", 1)
            self._add(step=self._position, summary=self._scalar(tag, value))
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._flush()

    def sync(self) -> None:
        self._flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished in the table of runs; the curves show the rest."""
        self._add(summary=self._at_end)
        self._flush()

    def close(self, error: str = "") -> None:
        self._flush()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        """Append what is pending to the file, which must still be there."""
        with self._path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(self._pending.getvalue())
        self._pending.seek(0)
        self._pending.truncate()
        self._flushed = time.monotonic()
