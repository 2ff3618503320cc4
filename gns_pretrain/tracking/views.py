"""Views of the run record: what a view is, the series it plots, and TensorBoard's.

The series have the same names in W&B and TensorBoard.
"""

import io
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gns_pretrain.errors import one_line
from gns_pretrain.system.processes import Worker

T = TypeVar("T")

AXES = ("step", "tokens", "samples")
_PREFIXES = {"train": "train", "validation": "val", "batch_size": "batch_size"}
_FLUSH_SECONDS = 30
WAIT_SECONDS = 90.0  # W&B's own limits are below
CLOSE_SECONDS = 10.0  # for a view that has failed
MAX_QUOTED = 300  # letters of a failure's cause


def axes(record: dict[str, Any]) -> dict[str, int]:
    """Return the positions a record carries, each usable as an x-axis: trainer/step and so on."""
    return {f"trainer/{axis}": record[axis] for axis in AXES if axis in record}


def series(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers a record carries, by series: train/loss, val/loss, batch_size/to,
    noise/<geometry>/<estimate>/noise_scale, shadow/<policy>/to and so on.

    Names and undefined values (null) are left out.
    """
    kind = record["kind"]
    if kind == "shadow":
        prefix = f"shadow/{record['policy']}"
    else:
        prefix = _PREFIXES.get(kind) or f"{kind}/{record['geometry']}/{record['estimate']}"
    return {
        f"{prefix}/{name}": value
        for name, value in record.items()
        if name not in AXES and isinstance(value, int | float)
    }


class View(Protocol):
    """Shows records somewhere."""

    def write(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl; an undefined number is None."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the finished run's summary."""

    def close(self) -> None:
        """Release files and processes; also after finish(), or a failure."""


class MayFail:
    """A view that cannot stop training: its first failure is logged in one line, and ends it.

    Its calls are made in a thread of their own, one after the other. One that does not return in
    time counts as failed and is left behind.

    Args:
        name: names the view in that line.
        open_view: makes the view; may fail as well.
        log: prints a line.
        wait_seconds: longest wait for one call.
    """

    def __init__(
        self,
        name: str,
        open_view: Callable[[], View],
        log: Callable[[str], None],
        *,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._name = name
        self._log = log
        self._wait_seconds = wait_seconds
        self._worker = Worker()
        self._view: View | None = None
        self._view = self._attempt(open_view)

    def write(self, record: dict[str, Any]) -> None:
        """Show one line, unless the view has failed."""
        if self._view is not None:
            self._attempt(partial(self._view.write, record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the summary, unless the view has failed."""
        if self._view is not None:
            self._attempt(partial(self._view.finish, summary))

    def close(self) -> None:
        """Close the view, unless it has failed."""
        if self._view is not None:
            self._attempt(self._view.close)
        self._worker.end()

    def _attempt(self, action: Callable[[], T]) -> T | None:
        try:
            return self._worker.call(action, self._wait_seconds)
        except (Exception, SystemExit) as error:
            failed, self._view = self._view, None
            if failed is not None and not self._worker.is_busy:
                with suppress(Exception, SystemExit):
                    self._worker.call(failed.close, CLOSE_SECONDS)
            cause = one_line(error)[:MAX_QUOTED]
            hint = (
                "; pip install 'gns-pretrain[tracking]'" if isinstance(error, ImportError) else ""
            )
            self._log(
                f"{self._name} failed and is left out from here on, metrics.jsonl has everything "
                f"({type(error).__name__}: {cause}{hint})"
            )
            return None


class TensorboardView:
    """Every series over optimizer steps, in an event file under <run directory>/tensorboard.

    Records are written in the calling thread: torch's SummaryWriter has one of its own, which
    prints the traceback of a full disk and may not tell its caller.

    Args:
        resume_step: the step the run resumes from; 0 is a run that starts. Points of later steps,
            left by a killed process, are hidden from TensorBoard.
    """

    def __init__(self, run_directory: Path, *, resume_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        self._event, self._scalar = Event, scalar
        self._pending = io.BytesIO()
        self._records = RecordWriter(self._pending)
        folder = run_directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        self._path.touch(exist_ok=False)
        self._add(file_version="brain.Event:2")
        hidden_from = resume_step + 1 if resume_step > 0 else 0
        self._add(step=hidden_from, session_log=SessionLog(status=SessionLog.START))
        self._flush()

    def write(self, record: dict[str, Any]) -> None:
        """Plot a record's numbers at its step."""
        for name, value in series(record).items():
            self._add(step=record["step"], summary=self._scalar(name, value))
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Add nothing: the curves show it."""

    def close(self) -> None:
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
