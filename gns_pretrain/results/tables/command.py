"""What scripts/make_table.py does: sources, selection, table, text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.results.tables.layout import Layout
from gns_pretrain.results.tables.layouts import LAYOUTS
from gns_pretrain.results.tables.selection import Selection, select
from gns_pretrain.results.tables.sources import (
    published_curves,
    runs_of_folders,
    runs_of_project,
)
from gns_pretrain.results.tables.table import FilledTable, fill


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
