"""A TensorBoard view of the run record: event files under <run directory>/tensorboard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

# The names under which the views plot a record's numbers; the same in W&B and TensorBoard.

AXES = ("step", "tokens", "samples")
_PREFIXES = {"train": "train", "validation": "val", "batch_size": "batch_size"}


def axes(record: dict[str, Any]) -> dict[str, int]:
    """The positions a record carries, each usable as an x-axis: trainer/step and so on."""
    return {f"trainer/{axis}": record[axis] for axis in AXES if axis in record}


def series(record: dict[str, Any]) -> dict[str, float]:
    """The numbers a record carries, by series: train/loss, val/loss, noise/<geometry>/<estimate>/…,
    shadow/<policy>/…

    Names and undefined values (null) are left out.
    """
    prefix = _PREFIXES.get(record["kind"])
    if record["kind"] == "shadow":
        prefix = f"shadow/{record['policy']}"
    elif prefix is None:
        prefix = f"{record['kind']}/{record['geometry']}/{record['estimate']}"
    return {
        f"{prefix}/{name}": value
        for name, value in record.items()
        if name not in AXES and isinstance(value, int | float)
    }


# What a view of the run record is, and the wrapper that keeps a failing one from the training.


class View(Protocol):
    """Shows records somewhere."""

    def write(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl; an undefined number is None."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Show what the finished run came to."""

    def close(self) -> None:
        """Let go of files and processes; also after finish()."""


class MayFail:
    """A view that cannot stop training: its first failure is said in one line, and ends it.

    Args:
        name: What the line calls it.
        open_view: Makes the view; may fail as well.
        say: Prints a line.
    """

    def __init__(
        self, name: str, open_view: Callable[[], View], say: Callable[[str], None]
    ) -> None:
        self._name = name
        self._say = say
        self._view: View | None = None
        self._attempt(lambda: setattr(self, "_view", open_view()))

    def write(self, record: dict[str, Any]) -> None:
        """Show one line, if the view still stands."""
        if (view := self._view) is not None:
            self._attempt(lambda: view.write(record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the summary, if the view still stands."""
        if (view := self._view) is not None:
            self._attempt(lambda: view.finish(summary))

    def close(self) -> None:
        """Close the view, if it still stands."""
        if (view := self._view) is not None:
            self._attempt(view.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._view = None
            cause = (str(error).splitlines() or [""])[0]
            way_out = "; pip install 'gns-pretrain[tracking]'" * isinstance(error, ImportError)
            self._say(
                f"{self._name} failed and is left out from here on, metrics.jsonl has everything "
                f"({type(error).__name__}: {cause}{way_out})"
            )


_FLUSH_SECONDS = 30


class TensorboardView:
    """Every series over optimizer steps.

    Args:
        run_directory: The run's folder.
        resume_step: The step the run goes on from; 0 is a run that starts. Points of later steps,
            left by a killed process, are hidden from TensorBoard.
    """

    def __init__(self, run_directory: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run_directory / "tensorboard"),
            purge_step=resume_step + 1 if resume_step > 0 else 0,
            flush_secs=_FLUSH_SECONDS,
        )

    def write(self, record: dict[str, Any]) -> None:
        """Plot a record's numbers at its step."""
        for name, value in series(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def finish(self, summary: dict[str, Any]) -> None:
        """Nothing: the curves say it."""

    def close(self) -> None:
        """Write out and close the event file."""
        self._writer.close()
