"""A search as text or Markdown."""

import io
from collections.abc import Callable
from statistics import stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gns_pretrain.results.search import Point, Search

LOSS = "lowest validation loss"
WIDTH = 500  # characters; lines are not wrapped


def as_text(search: Search) -> str:
    """For a terminal."""
    table = Table(title=_title(search), title_justify="left", box=box.SIMPLE_HEAD)
    for name in (*search.settings, LOSS):
        table.add_column(name, justify="right", no_wrap=True)
    for point in search.points:
        table.add_row(*_cells(point))
    drawn = io.StringIO()
    Console(file=drawn, width=WIDTH).print(table)
    return "\n".join(
        [*(line.rstrip() for line in drawn.getvalue().splitlines()), *_notes(search), ""]
    )


def as_markdown(search: Search) -> str:
    """A table of GitHub's Markdown, with its notes as a list."""
    headers = [*search.settings, LOSS]
    rows = [headers, ["---:"] * len(headers), *(_cells(point) for point in search.points)]
    lines = [f"**{_title(search)}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in _notes(search)), ""])


FORMATS: dict[str, Callable[[Search], str]] = {"text": as_text, "markdown": as_markdown}


def _title(search: Search) -> str:
    return f"{search.optimizer} at scale={search.scale}: {len(search.points)} points"


def _cells(point: Point) -> list[str]:
    spread = f" ± {stdev(point.losses):.4f}" if len(point.losses) > 1 else ""
    return [*(_shown(value) for value in point.values.values()), f"{point.loss:.4f}{spread}"]


def _notes(search: Search) -> list[str]:
    numbers = ", ".join(f"{name}: {_shown(value)}" for name, value in search.for_the_scale.items())
    notes = [f"for conf/scale/{search.scale}.yaml: scale.{search.optimizer}: {{{numbers}}}"]
    notes += [f"{end}: search on beyond it" for end in search.at_an_end]
    if search.unfinished:
        notes.append(f"not counted, unfinished: {search.unfinished} runs")
    return notes


def _shown(value: Any) -> str:
    """A number as it is typed."""
    return f"{value:g}" if isinstance(value, float) else str(value)
