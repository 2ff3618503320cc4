"""The progress bar of a preparation: part of the corpus read, tokens written, tokens per second."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class PreparationBar:
    """One bar a split, on standard error, so that standard output stays for results."""

    def __init__(self, *, hidden: bool = False):
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[millions]:,.1f} M tokens"),
            TextColumn("{task.fields[thousands]:,.0f} k tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=hidden),
            disable=hidden,
        )
        self._tasks: dict[str, tuple[TaskID, float, int]] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, highlight=False)

    def update(self, split: str, tokens: int, fraction: float) -> None:
        """Show tokens written so far, and the fraction (0 to 1) of the split that is done."""
        now = time.perf_counter()
        if split not in self._tasks:
            task = self._bars.add_task(split, total=None, millions=0.0, thousands=0.0)
            self._tasks[split] = (task, now, tokens)
        task, began, tokens_at_start = self._tasks[split]
        rate = (tokens - tokens_at_start) / max(now - began, 1e-9)
        self._bars.update(
            task,
            completed=fraction,
            total=1.0 if fraction else None,  # a stream may not know its length
            millions=tokens / 1e6,
            thousands=rate / 1e3,
        )
