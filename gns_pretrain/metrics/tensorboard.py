"""A TensorBoard view of the run record: event files under <run directory>/tensorboard."""

from pathlib import Path
from typing import Any

from gns_pretrain.metrics.series import series

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
