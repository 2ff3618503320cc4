"""A layout and its runs become a filled table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.results.tables.layouts import (
    LAYOUTS,
    Entry,
    Kind,
    Layout,
    Seeds,
    Statistic,
    Text,
    median_steps,
    minimum_loss,
    paired,
    reduction_by_first_reaching,
    reduction_by_total_steps,
)
from gns_pretrain.results.tables.selection import (
    Selection,
    published_curves,
    runs_of_folders,
    runs_of_project,
    select,
)

# What a table says of its numbers, by what is in it.
MEANING: dict[Kind, str] = {
    "loss": (
        "validation loss: the lowest of a run's evaluations, nats per token; mean ± sample "
        "standard deviation over seeds"
    ),
    "steps": "median steps: median over seeds of all optimizer steps of a run",
    "first_reaching": (
        "steps reduction by first reaching: 1 - a/b, a the step at which the adaptive run first "
        "has the baseline's lowest loss, b the step at which the baseline of the same seed has it; "
        "median over the seeds that reach it, - if none does"
    ),
    "total_steps": (
        "steps reduction by total steps: 1 - a/b, a and b all steps of the two runs; median over "
        "seeds"
    ),
}
PAPER_MEANING = (
    "paper: as printed in arXiv:2602.03001 (Table 3, the Euclidean column of Table 2 and the "
    "sensitivity to theta: revised version); its one steps reduction stands beside both of ours"
)


@dataclass(frozen=True)
class FilledEntry:
    """An entry with its number; None without runs."""

    entry: Entry
    statistic: Statistic | None
    marked: bool  # seeds are missing; the notes say which


@dataclass(frozen=True)
class FilledRow:
    """A row with its numbers."""

    labels: tuple[str, ...]
    entries: tuple[FilledEntry, ...]


@dataclass
class FilledTable:
    """A table, ready to be rendered.

    Args:
        layout: of it.
        scale: of its runs; None where it holds published curves alone.
        headers: group and title of each column.
        rows: from top to bottom.
        with_paper: whether the paper's values stand beside ours.
        notes: what stands under the table.
    """

    layout: Layout
    scale: str | None
    headers: list[tuple[str, str]]
    rows: list[FilledRow]
    with_paper: bool
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """With the scale."""
        source = "published curves" if self.scale is None else f"scale {self.scale}"
        return f"{self.layout.title} ({source})"

    @property
    def explanations(self) -> list[str]:
        """What its numbers are."""
        kinds = {entry.kind for entry in self.layout.entries}
        meanings = [text for kind, text in MEANING.items() if kind in kinds]
        baseline = [self.layout.baseline] if self.layout.baseline else []
        return [*meanings, *baseline, *([PAPER_MEANING] if self.with_paper else [])]


def fill(layout: Layout, selection: Selection, published: Mapping[str, Seeds]) -> FilledTable:
    """Compute every entry.

    Args:
        layout: of the table.
        selection: its runs.
        published: curves by cell, in place of runs.

    Raises:
        InputError: a cell has both, or nothing has any.
    """
    for cell in published.keys() & selection.runs:
        raise InputError(
            f"{cell} is given as a published curve, and by runs such as "
            f"{next(iter(selection.runs[cell].values())).name}; leave one of them out"
        )
    if not published and not selection.runs:
        raise InputError(
            f"no run of {layout.name} is finished, {len(selection.unfinished)} are not; start "
            "their commands again to finish them"
        )
    curves: dict[str, Seeds] = {
        cell: {seed: run.read() for seed, run in runs.items()}
        for cell, runs in selection.runs.items()
    } | dict(published)
    missing = missing_seeds(layout, selection)
    settings = {cell: next(iter(runs.values())).settings for cell, runs in selection.runs.items()}
    scale = selection.scale if selection.runs else None

    def shown(text: Text, entries: Sequence[Entry]) -> str:
        return _shown(text, [settings[e.cell] for e in entries if e.cell in settings], scale)

    rows = [
        FilledRow(
            tuple(shown(label, row.entries) for label in row.labels),
            tuple(_filled(entry, curves, missing) for entry in row.entries),
        )
        for row in layout.rows
    ]
    headers = [
        (column.group, shown(column.title, [row.entries[number] for row in layout.rows]))
        for number, column in enumerate(layout.columns)
    ]
    return FilledTable(
        layout=layout,
        scale=scale,
        headers=headers,
        rows=rows,
        with_paper=scale in (None, layout.paper_scale),
        notes=_notes(layout, curves, missing, selection),
    )


def missing_seeds(layout: Layout, selection: Selection) -> dict[str, list[int]]:
    """Seeds that a cell of runs lacks and another one has, by cell."""
    seeds = sorted({seed for runs in selection.runs.values() for seed in runs})
    return {
        cell: lacking
        for cell in layout.cells
        if (runs := selection.runs.get(cell))
        and (lacking := [seed for seed in seeds if seed not in runs])
    }


def statistic_of(entry: Entry, curves: Mapping[str, Seeds]) -> Statistic | None:
    """An entry's number; None where it has no runs."""
    runs = curves.get(entry.cell)
    if not runs:
        return None
    if entry.baseline is None:
        return minimum_loss(runs) if entry.kind == "loss" else median_steps(runs)
    baseline = curves.get(entry.baseline)
    if not baseline or not paired(runs, baseline):
        return None
    if entry.kind == "total_steps":
        return reduction_by_total_steps(runs, baseline)
    return reduction_by_first_reaching(runs, baseline)


def _filled(
    entry: Entry, curves: Mapping[str, Seeds], missing: Mapping[str, list[int]]
) -> FilledEntry:
    cells = [entry.cell] if entry.baseline is None else [entry.cell, entry.baseline]
    marked = any(cell in missing for cell in cells) or bool(_unpaired(entry, curves))
    statistic = statistic_of(entry, curves)
    return FilledEntry(entry, statistic, marked and statistic is not None)


def _unpaired(entry: Entry, curves: Mapping[str, Seeds]) -> list[int]:
    """Seeds that the adaptive runs or the baseline have alone."""
    runs, baseline = curves.get(entry.cell, {}), curves.get(entry.baseline or "", {})
    return sorted(runs.keys() ^ baseline.keys()) if runs and baseline else []


def _shown(text: Text, settings: Sequence[Mapping[str, Any]], scale: str | None) -> str:
    if text.key is None:
        return text.text
    values = sorted({run[text.key] for run in settings if text.key in run})
    if not values and scale is None:
        return text.text.format(text.paper)
    return text.text.format(" or ".join(str(value) for value in values) or text.role)


def _notes(
    layout: Layout,
    curves: Mapping[str, Seeds],
    missing: Mapping[str, list[int]],
    selection: Selection,
) -> list[str]:
    notes = []
    if absent := [cell for cell in layout.cells if cell not in curves]:
        notes.append(f"no run: {', '.join(absent)}")
    notes += [f"* missing seeds: {cell} lacks {_listed(lack)}" for cell, lack in missing.items()]
    for entry in layout.entries:
        if entry.kind == "first_reaching" and (alone := _unpaired(entry, curves)):
            notes.append(
                f"* not paired: {entry.cell} and {entry.baseline} do not both have seeds "
                f"{_listed(alone)}"
            )
    notes += [f"not counted, unfinished: {name}" for name in selection.unfinished]
    return notes + selection.notes


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


# What scripts/make_table.py does: sources, selection, table, text.


@dataclass(frozen=True)
class TableRequest:
    """What somebody asks for.

    Args:
        table: name of a layout.
        sources: folders of runs, and cell=PATH for published curves.
        scale: as for `select`.
        where: conditions, each key=value.
        project: of W&B, in place of folders.
    """

    table: str
    sources: Sequence[str] = ()
    scale: str | None = None
    where: Sequence[str] = ()
    project: str | None = None


def make_table(request: TableRequest) -> FilledTable:
    """Read, choose and compute.

    Raises:
        InputError: whatever keeps the table from being made, in one line.
    """
    layout = LAYOUTS[request.table]
    curves, folders = _told_apart(layout, request.sources)
    if request.project and folders:
        raise InputError(
            f"--wandb {request.project} and {folders[0]} are both given; read one or the other"
        )
    if not (curves or folders or request.project):
        raise InputError(
            f"{request.table} of what? name folders of runs, as outputs, "
            f"or curves, as {layout.cells[0]}=FILE.csv, or --wandb entity/project"
        )
    if (request.scale or request.where) and not (folders or request.project):
        raise InputError("--scale and --where choose among runs, and only curves are given")
    conditions = dict(_pair(text) for text in request.where)
    selection = Selection()
    if request.project:
        runs = runs_of_project(request.project, request.table)
        selection = select(layout, runs, scale=request.scale, conditions=conditions)
    elif folders:
        runs = runs_of_folders(folders)
        selection = select(layout, runs, scale=request.scale, conditions=conditions)
    return fill(layout, selection, published_curves(layout, curves))


def _told_apart(
    layout: Layout, sources: Sequence[str]
) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Curves with their cells, and folders; a folder's own name may hold an equals sign."""
    curves, folders = [], []
    for source in sources:
        cell, equals, path = source.partition("=")
        if equals and not Path(source).exists() and "/" not in cell:
            curves.append((cell, Path(path)))
        else:
            folders.append(Path(source))
    return curves, folders


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InputError(f"--where {text} is not key=value, as in --where batch_size.theta=0.6")
    return key, value
