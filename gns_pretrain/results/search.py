"""What a search over settings found (arXiv:2602.03001, Table 5): its points, the best one first."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gns_pretrain.config.schema import ScaleSettings
from gns_pretrain.errors import InputError
from gns_pretrain.results.tables.selection import TableRun
from gns_pretrain.runs.identity import Purpose, decides

SEARCH = "tune"  # the runs' setting `table`


@dataclass(frozen=True)
class Point:
    """One point of a search.

    Args:
        values: of the settings that differ between the points, by dotted name.
        losses: the lowest validation loss of each seed, nats per token.
        settings: all settings of one of its runs.
    """

    values: Mapping[str, Any]
    losses: tuple[float, ...]
    settings: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return fmean(self.losses)


@dataclass(frozen=True)
class Search:
    """One optimizer's search at one scale.

    Args:
        optimizer: name of its group in a scale.
        scale: name of the scale.
        settings: that differ between the points.
        points: finished ones, the lowest loss first.
        unfinished: runs that do not count yet.
    """

    optimizer: str
    scale: str
    settings: tuple[str, ...]
    points: tuple[Point, ...]
    unfinished: int

    @property
    def at_an_end(self) -> list[str]:
        """Settings whose best value is the smallest or the largest of all that were tried."""
        ends = []
        for name in self.settings:
            tried = [point.values[name] for point in self.points]
            if all(isinstance(value, int | float) for value in tried):
                best = tried[0]
                if best in (min(tried), max(tried)) and min(tried) != max(tried):
                    ends.append(f"{name}={best} is the {_end(best, tried)} that was tried")
        return ends

    @property
    def for_the_scale(self) -> dict[str, Any]:
        """The best point's numbers as conf/scale/<scale>.yaml names them."""
        group = next(f.default_factory for f in fields(ScaleSettings) if f.name == self.optimizer)
        best = self.points[0].settings
        keys = {
            field.name: f"optimizer.{field.name.replace('adamw_lr', 'adamw.lr')}"
            for field in fields(group)  # type: ignore[arg-type]
        }
        return {name: best[key] for name, key in keys.items() if key in best}


def searches(runs: Sequence[TableRun]) -> list[Search]:
    """The searches that these runs belong to, by scale and optimizer.

    Raises:
        InputError: none of them is a search's, or no run of one is finished.
    """
    own = [run for run in runs if run.table == SEARCH]
    if not own:
        raise InputError(
            f"none of {len(runs)} runs belongs to a search; "
            "start one with python train.py +sweep=tune_signum scale=..."
        )
    keys = sorted({(run.scale, run.cell) for run in own})
    return [
        _search(scale, cell, [run for run in own if (run.scale, run.cell) == (scale, cell)])
        for scale, cell in keys
    ]


def _search(scale: str, optimizer: str, runs: Sequence[TableRun]) -> Search:
    finished = [run for run in runs if run.finished]
    if not finished:
        raise InputError(
            f"no run of {optimizer}'s search at scale={scale} is finished; start its command again"
        )
    settings = _differing([run.settings for run in finished])
    members: dict[str, list[TableRun]] = {}
    for run in finished:
        members.setdefault(repr([run.settings.get(name) for name in settings]), []).append(run)
    points = [
        Point(
            values={name: same[0].settings.get(name) for name in settings},
            losses=tuple(run.read().minimum for run in same),
            settings=same[0].settings,
        )
        for same in members.values()
    ]
    points.sort(key=lambda point: point.loss)
    return Search(optimizer, scale, settings, tuple(points), len(runs) - len(finished))


def _differing(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = sorted({name for settings in runs for name in settings})
    return tuple(
        name
        for name in names
        if any(decides(name, settings, Purpose.CURVE) for settings in runs)
        and any(settings.get(name) != runs[0].get(name) for settings in runs)
    )


def _end(value: Any, tried: Sequence[Any]) -> str:
    return "smallest" if value == min(tried) else "largest"


# A search as text or Markdown.

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
