"""What a branch of a run is known by, and when the run itself is the branch at its own batch."""

from collections.abc import Sequence
from typing import Any

TABLE = "critical_batch"  # the branches' setting `table`
MIN_STEPS = 8  # of a branch that counts: a rate scaled for a larger batch takes some to show


def step_of_window(
    records: Sequence[dict[str, Any]], start: int, window: int
) -> dict[str, Any] | None:
    """The first training line of a window that the run has trained at one batch size and rate.

    Args:
        records: of the run.
        start: tokens before the window.
        window: its tokens.

    Returns:
        None where batch size or learning rate changes in it, or no validation loss is at its end:
        a branch then has to train it.
    """
    end = start + window
    inside = [
        line
        for line in records
        if line["kind"] in ("train", "validation") and start < line["tokens"] <= end
    ]
    steps = [line for line in inside if line["kind"] == "train"]
    one_kind = len({(line["batch_size"], line["lr"]) for line in steps}) == 1
    validated = any(line["kind"] == "validation" and line["tokens"] == end for line in inside)
    return steps[0] if one_kind and validated else None
