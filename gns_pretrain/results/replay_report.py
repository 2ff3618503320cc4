"""A replayed path beside the recorded one: the table, the verdict, JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from gns_pretrain.results.reading import Row

LEARNING_RATE_TOLERANCE = 1e-9  # relative


@dataclass(frozen=True)
class Replayed:
    """One recorded step and its replay.

    Args:
        row: the record's.
        batch_size: sequences of the step; None once the replay has reached the budget.
        tokens: consumed when it was done; likewise.
        lr: learning rate; None also where the peak is not known.
        target: of the last decision that was taken, sequences; None before the first.
    """

    row: Row
    batch_size: int | None
    tokens: int | None
    lr: float | None
    target: float | None

    @property
    def difference(self) -> str | None:
        """What differs first, for people; None if all that the record says is the same."""
        row = self.row
        if self.batch_size is None or self.tokens is None:
            return "the replay has reached its token budget before it"
        for name, recorded, mine in (
            ("batch size", row.batch_size, self.batch_size),
            ("tokens", row.tokens, self.tokens),
        ):
            if recorded is not None and recorded != mine:
                return f"{name} {recorded:,} in the file, {mine:,} in the replay"
        if (error := self.lr_error) is not None and not error <= LEARNING_RATE_TOLERANCE:
            return f"lr {row.lr!r} in the file, {self.lr!r} in the replay"
        return None

    @property
    def lr_error(self) -> float | None:
        """Difference of the learning rates over the recorded one; None where one is missing."""
        if self.row.lr is None or self.lr is None:
            return None
        scale = abs(self.row.lr) or 1.0
        return abs(self.lr - self.row.lr) / scale


def first_difference(path: list[Replayed]) -> str | None:
    """The first row that differs, named; None if none does."""
    for step in path:
        if step.difference is not None:
            return (
                f"first difference at step {step.row.step:,} ({step.row.where}): {step.difference}"
            )
    return None


def side_by_side(path: list[Replayed], *, every_row: bool) -> list[str]:
    """A table of the two paths: first, last and differing rows, and those where a batch changes."""
    lines = [
        f"{'':>9} | {'in the file':^36} | {'replayed':^46}",
        f"{'step':>9} | {'batch':>6} {'tokens':>16} {'lr':>12} "
        f"| {'target':>9} {'batch':>6} {'tokens':>16} {'lr':>12}",
    ]
    differed = False
    for before, step, after in zip([None, *path], path, [*path[1:], None], strict=False):
        turns = (
            before is None
            or after is None
            or (before.batch_size, before.row.batch_size) != (step.batch_size, step.row.batch_size)
        )
        if every_row or turns or (step.difference and not differed):
            lines.append(path_line(step))
        differed = differed or step.difference is not None
    return lines


def path_line(step: Replayed) -> str:
    """One row of the table."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    row = step.row
    return (
        f"{row.step:>9,} | {text(row.batch_size, ','):>6} {text(row.tokens, ','):>16} "
        f"{text(row.lr, '.6e'):>12} | {text(step.target, ',.1f'):>9} "
        f"{text(step.batch_size, ','):>6} {text(step.tokens, ','):>16} {text(step.lr, '.6e'):>12}"
        f"{'   <- differs' if step.difference else ''}"
    )


def verdict(path: list[Replayed]) -> str:
    """One line on how the two paths compare."""
    difference = first_difference(path)
    if difference is not None:
        return difference
    errors = [step.lr_error for step in path if step.lr_error is not None]
    batches = sum(step.row.batch_size is not None for step in path)
    tokens = sum(step.row.tokens is not None for step in path)
    largest = f"; largest relative difference of lr {max(errors):.1e}" if errors else ""
    return (
        f"the same path in {len(path):,} rows: batch size in {batches:,}, tokens in {tokens:,}, "
        f"lr in {len(errors):,}{largest}"
    )


def as_json(path: list[Replayed]) -> dict[str, Any]:
    """The two paths for another program."""
    keys = ("batch_size", "tokens", "lr", "target")
    return {
        "rows": len(path),
        "first_difference": first_difference(path),
        "path": [
            {
                "step": step.row.step,
                "recorded": {key: value for key, value in asdict(step.row).items() if key in keys},
                "replayed": {key: getattr(step, key) for key in keys},
            }
            for step in path
        ],
    }
