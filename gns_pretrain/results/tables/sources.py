"""Runs of a table: from run directories, from a W&B project, from published curves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.metrics.wandb import TrackedRun, tracked_runs
from gns_pretrain.results.curves import Curve, curve_files, curves_of_csv, seed_in_name
from gns_pretrain.results.runs import (
    RunRecord,
    read_settings,
    read_summary,
    run_directories,
)
from gns_pretrain.results.tables.layout import Layout
from gns_pretrain.results.tables.statistics import LossCurve, Seeds
from gns_pretrain.run_directory import PROVENANCE, flattened, read_provenance

FINGERPRINT = "data_fingerprint"  # of run.json, among the settings


@dataclass(frozen=True)
class TableRun:
    """A run that may belong to a table; its curve is read only once it is chosen.

    Args:
        name: its directory, or its name in W&B.
        settings: by dotted name.
        finished: whether it has spent its token budget.
        read: reads its evaluations.
    """

    name: str
    settings: Mapping[str, Any]
    finished: bool
    read: Callable[[], LossCurve]

    @property
    def table(self) -> str | None:
        """Which table; None for a run of none."""
        return self.settings.get("table")

    @property
    def cell(self) -> str:
        """Its place there."""
        return str(self.settings.get("cell"))

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.settings.get("seed", 0))

    @property
    def scale(self) -> str:
        """Name of its scale."""
        return str(self.settings.get("scale.name"))


def runs_of_folders(paths: Iterable[Path]) -> list[TableRun]:
    """Every run in these folders, of whatever table, once.

    Raises:
        InputError: a folder is missing, or a config.yaml cannot be read.
    """
    directories = {
        directory.resolve(): directory for path in paths for directory in run_directories(path)
    }
    return [
        TableRun(
            name=str(directory),
            settings=flattened(read_settings(directory)) | data_of(directory),
            finished=read_summary(directory).get("state") == "finished",
            read=partial(loss_curve, directory),
        )
        for directory in directories.values()
    ]


def data_of(directory: Path) -> dict[str, str]:
    """The fingerprint of a run's data, as a setting; its path says little."""
    known = (directory / PROVENANCE).is_file()
    return {FINGERPRINT: read_provenance(directory)["data_fingerprint"]} if known else {}


def loss_curve(directory: Path) -> LossCurve:
    """Evaluations of a finished run."""
    run = RunRecord.read(directory)
    evaluations = [
        (line["step"], line["loss"])
        for line in run.records
        if line["kind"] == "validation" and line["loss"] is not None
    ]
    return _loss_curve(evaluations, run.summary["steps"], str(directory))


def runs_of_project(project: str, table: str) -> list[TableRun]:
    """Runs of a W&B project that carry a table's name; InputError if it cannot be read."""
    return [_of_project(run) for run in tracked_runs(project, filters={"config.table": table})]


def _of_project(run: TrackedRun) -> TableRun:
    return TableRun(
        name=run.name,
        settings=flattened(run.config),
        finished=run.finished,
        read=lambda: _loss_curve(run.validation(), run.steps, run.name),
    )


def published_curves(layout: Layout, given: Iterable[tuple[str, Path]]) -> dict[str, Seeds]:
    """Curves by cell and seed; a folder stands for the CSVs in it.

    The seed is the one in a file's name, else its number among the files of its cell, from 0.

    Args:
        layout: whose cells they are.
        given: pairs of cell and path.

    Raises:
        InputError: there is no such cell or file, or two files have one seed.
    """
    files: dict[str, list[Path]] = {}
    for cell, path in given:
        if cell not in layout.cells:
            raise InputError(
                f"{cell}={path}: {layout.name} has no such cell; use one of "
                f"{', '.join(layout.cells)}"
            )
        files.setdefault(cell, []).extend(curve_files(path))
    return {cell: _by_seed(cell, paths) for cell, paths in files.items()}


def _by_seed(cell: str, paths: list[Path]) -> Seeds:
    curves: dict[int, LossCurve] = {}
    for number, path in enumerate(paths):
        named = seed_in_name(path)
        seed = number if named is None else named
        if seed in curves:
            raise InputError(
                f"{cell}={path}: the cell has a curve of seed {seed} already; give it once"
            )
        curves[seed] = curve_of_file(path)
    return curves


def curve_of_file(path: Path) -> LossCurve:
    """Evaluations of a CSV; the run has as many steps as its last row says."""
    curve = curves_of_csv(path).get("loss", Curve.through([]))
    points = [(int(step), float(loss)) for step, loss in zip(curve.x, curve.y, strict=True)]
    return _loss_curve(points, points[-1][0] if points else 0, str(path))


def _loss_curve(evaluations: list[tuple[int, float]], total_steps: int, name: str) -> LossCurve:
    if not evaluations:
        raise InputError(f"{name} holds no validation loss; a table needs evaluated runs")
    steps, losses = zip(*evaluations, strict=True)
    return LossCurve(tuple(steps), tuple(losses), total_steps)
