"""The runs of one table, one scale and one set of settings; nothing is mixed silently."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.results.curves import (
    Curve,
    curve_files,
    curves_of_csv,
    natural_order,
    seed_in_name,
)
from gns_pretrain.results.tables.layouts import Layout, LossCurve, Seeds
from gns_pretrain.runs.directory import RunRecord, read_summary, run_directories
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    decides,
    deciding_settings,
    differing_settings,
    flatten,
    settings_of_run,
)
from gns_pretrain.tracking.wandb import TrackedRun, tracked_runs

# Runs of a table: from run directories, from a W&B project, from published curves.


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
            settings=settings_of_run(directory),
            finished=read_summary(directory).get("state") == "finished",
            read=partial(loss_curve, directory),
        )
        for directory in directories.values()
    ]


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
        settings=flatten(run.config),
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
    return {cell: _curves_by_seed(cell, paths) for cell, paths in files.items()}


def _curves_by_seed(cell: str, paths: list[Path]) -> Seeds:
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


Conditions = Mapping[str, str]  # dotted setting: value as it is typed
# In these all cells of a table agree; else its numbers could not be compared.
COMMON = (
    FINGERPRINT,
    "token_budget",
    "model",
    "data.sequence_length",
    "evaluation.num_sequences",
)
SHOWN = 4  # settings, of all that differ, in an error


@dataclass
class Selection:
    """The runs that count.

    Args:
        scale: theirs; None without any.
        runs: finished ones, by cell and seed.
        unfinished: names of those that do not count yet.
        notes: what else a reader should know.
    """

    scale: str | None = None
    runs: dict[str, dict[int, TableRun]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def select(
    layout: Layout,
    runs: Sequence[TableRun],
    *,
    scale: str | None = None,
    conditions: Conditions | None = None,
) -> Selection:
    """Choose a table's runs.

    Args:
        layout: of the table.
        runs: of whatever table; may hold sweeps of several variants.
        scale: the scale to take, where the runs have several.
        conditions: settings that the runs must have.

    Raises:
        InputError: no run is left, the scale is not clear, or runs that are to stand for the same
            thing have different settings.
    """
    own = [run for run in runs if run.table == layout.name and run.cell in layout.cells]
    if not own:
        others = sorted({str(run.table) for run in runs} - {"None"})
        raise InputError(
            f"none of {len(runs)} runs belongs to {layout.name} (their setting table: "
            f"{', '.join(others) or 'none'}); train it with python train.py +sweep={layout.name}"
        )
    chosen_scale, own = _of_scale(layout, own, scale)
    own = _where(own, conditions or {})
    selection = Selection(chosen_scale, unfinished=[run.name for run in own if not run.finished])
    finished = sorted((run for run in own if run.finished), key=lambda run: run.cell)
    for cell, members in groupby(finished, key=lambda run: run.cell):
        alike = sorted(members, key=lambda run: natural_order(Path(run.name)))
        refuse_differences(alike, what_counts, f"of {layout.name}'s cell {cell}")
        selection.runs[cell] = _by_seed(alike, selection.notes)
    refuse_differences(finished, what_is_common, f"of {layout.name}")
    return selection


def _of_scale(
    layout: Layout, runs: list[TableRun], scale: str | None
) -> tuple[str, list[TableRun]]:
    found = sorted({run.scale for run in runs})
    if scale is None and len(found) > 1:
        raise InputError(
            f"the runs of {layout.name} have several scales, {', '.join(found)}; "
            f"choose one, as in --scale {found[0]}"
        )
    scale = scale or found[0]
    if scale not in found:
        raise InputError(
            f"--scale {scale}: no run of {layout.name} has it; they have {', '.join(found)}"
        )
    return scale, [run for run in runs if run.scale == scale]


def _where(runs: list[TableRun], conditions: Conditions) -> list[TableRun]:
    """Runs with the settings asked for; a run that does not read a setting may have any."""
    for key, text in conditions.items():
        readers = [run for run in runs if key in run.settings and _reads(key, run.settings)]
        if not any(key in run.settings for run in runs):
            known = {name for run in runs for name in run.settings}
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--where {key}={text}: no run has that setting{hint}")
        dropped = [run for run in readers if not _matches(run.settings[key], text)]
        if readers and len(dropped) == len(readers):
            values = sorted({str(run.settings[key]) for run in readers})
            raise InputError(f"--where {key}={text}: no run has it; they have {', '.join(values)}")
        runs = [run for run in runs if not any(run is other for other in dropped)]
    return runs


def _matches(value: Any, text: str) -> bool:
    """Whether a setting has a value as it is typed: 1e-3, true, [plug_in]."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text.replace("_", "")) == value
        except ValueError:
            return False
    try:
        return text == str(value) or bool(yaml.safe_load(text) == value)
    except yaml.YAMLError:
        return False


def _reads(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run uses this setting: a constant batch has a theta, and does not read it."""
    grouped = key.startswith(("batch_size.", "noise_scale."))
    return not grouped or decides(key, settings, Purpose.CURVE)


def what_counts(run: TableRun) -> dict[str, Any]:
    """Settings that make it another run, the seed aside."""
    return deciding_settings(run.settings, Purpose.CURVE)


def what_is_common(run: TableRun) -> dict[str, Any]:
    """Settings that all runs of a table share."""
    return {
        key: value
        for key, value in what_counts(run).items()
        if any(key == common or key.startswith(common + ".") for common in COMMON)
    }


def refuse_differences(runs: Sequence[TableRun], settings_of: Any, what: str) -> None:
    """Refuse runs that cannot stand together.

    Args:
        runs: that are to agree.
        settings_of: what must agree.
        what: they have in common, for people.

    Raises:
        InputError: naming two runs, and the settings that differ.
    """
    for run in runs[1:]:
        first, other = settings_of(runs[0]), settings_of(run)
        if keys := differing_settings(first, other):
            shown = [f"{key}: {first.get(key)} and {other.get(key)}" for key in keys[:SHOWN]]
            more = ["..."] if len(keys) > SHOWN else []
            raise InputError(
                f"two runs {what} have different settings, {runs[0].name} and {run.name} "
                f"({', '.join(shown + more)}); choose, as in "
                f"--where {keys[0]}={first.get(keys[0])}"
            )


def _by_seed(runs: Iterable[TableRun], notes: list[str]) -> dict[int, TableRun]:
    """Runs of a cell; of two with one seed and the same settings the later name counts."""
    seeds: dict[int, TableRun] = {}
    for run in runs:
        if run.seed in seeds:
            notes.append(
                f"not counted: {seeds[run.seed].name}, of the same settings and seed as {run.name}"
            )
        seeds[run.seed] = run
    return dict(sorted(seeds.items()))
