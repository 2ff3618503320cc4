"""What became of the runs of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gns_pretrain.errors import TrainingError

# Names of this command's runs that failed: a search passes over them and ends well without.
FAILED: list[str] = []
MAX_WIDTH = 1000  # columns of a table that the terminal may wrap
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        name: of the run.
        state: finished (now), skipped (it was), shared (it equals another one), failed or stopped.
        why: of a run that is not there, or whose record is another's.
        summary: of the finished run.
    """

    name: str
    state: str
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        """Whether the run's record is whole."""
        return self.state in ("finished", "skipped", "shared")


def note_failures(outcomes: Sequence[Outcome]) -> None:
    """Remember for the end of the command which of its runs failed."""
    FAILED.extend(outcome.name for outcome in outcomes if outcome.state == "failed")


def failure_of_sweep() -> TrainingError | None:
    """What to say at the end of a sweep some of whose runs failed."""
    if not FAILED:
        return None
    names = ", ".join(FAILED[:SHOWN_NAMES]) + (", ..." if len(FAILED) > SHOWN_NAMES else "")
    return TrainingError(
        f"{len(FAILED)} of the sweep's runs failed ({names}); the tables say why, and the same "
        "command goes on with them"
    )


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table of what ran, what was skipped and what failed, and why; as wide as it needs."""
    table = Table(title=f"{len(outcomes)} runs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("steps", "last batch", "lowest val. loss", "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        summary = outcome.summary
        figures = ["", "", "", ""]
        if summary:
            figures = [
                f"{summary['steps']:,}",
                f"{summary['batch_size']:,}",
                f"{summary['minimum_validation_loss']:.4f}",
                f"{summary['seconds']:.0f} s",
            ]
        table.add_row(outcome.name, outcome.state, *figures)
    Console(file=console.file, width=MAX_WIDTH).print(table)
    for outcome in outcomes:
        if outcome.why and outcome.state != "skipped":
            line = f"{outcome.name} {outcome.state}: {outcome.why}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
