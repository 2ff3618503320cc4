"""A table of the paper made of runs: choose them, compute its numbers, note what is missing.

Runs are never mixed silently: those that stand for one cell have the same settings, the seed
aside, and all runs of a table share what makes its numbers comparable. Steps are optimizer steps;
runs that are compared have the same seed.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.results.frame import (
    Runs,
    curve_files,
    natural_order,
    pd,
    read_losses,
    runs_of_curves,
    runs_of_folders,
    runs_of_project,
)
from gns_pretrain.results.layouts import LAYOUTS, Entry, Label, Quantity, Statistic, TableLayout
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    decides,
    deciding_settings,
    differing_settings,
)

Cells = Mapping[str, pd.DataFrame]  # runs of each cell by seed, with their losses (`by_cell`)

# What a number of each kind means, below the table.
MEANING: dict[Quantity, str] = {
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
# In these all cells of a table agree; else its numbers could not be compared.
COMMON = (
    FINGERPRINT,
    "token_budget",
    "model",
    "data.sequence_length",
    "evaluation.num_sequences",
)
SHOWN = 4  # settings, of all that differ, in an error


@dataclass(frozen=True)
class FilledEntry:
    """An entry with the number of our runs; None without runs."""

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
        headers: group and title of each column of entries.
        rows: from top to bottom.
        notes: what is missing or was left out.
    """

    layout: TableLayout
    scale: str | None
    headers: list[tuple[str, str]]
    rows: list[FilledRow]
    notes: list[str]

    @property
    def with_paper(self) -> bool:
        """Whether the paper's values stand beside ours."""
        return self.scale in (None, self.layout.paper_scale)

    @property
    def title(self) -> str:
        """The layout's, with the scale."""
        source = "published curves" if self.scale is None else f"scale {self.scale}"
        return f"{self.layout.title} ({source})"

    @property
    def explanations(self) -> list[str]:
        """What its numbers are."""
        quantities = {entry.quantity for entry in self.layout.entries}
        meanings = [text for quantity, text in MEANING.items() if quantity in quantities]
        baseline = [self.layout.baseline] if self.layout.baseline else []
        return [*meanings, *baseline, *([PAPER_MEANING] if self.with_paper else [])]


def make_table(
    name: str,
    sources: Sequence[str] = (),
    *,
    scale: str | None = None,
    where: Sequence[str] = (),
    project: str | None = None,
) -> FilledTable:
    """Read runs, choose those of a table and compute its numbers.

    Args:
        name: of a layout.
        sources: folders of runs, and cell=PATH for published curves.
        scale: the scale to take, where the runs have several.
        where: conditions on the settings of runs, each key=value.
        project: of W&B, in place of folders.

    Raises:
        InputError: whatever keeps the table from being made, in one line.
    """
    layout = LAYOUTS[name]
    curves, folders = _split_sources(layout, sources)
    if project and folders:
        raise InputError(
            f"--wandb {project} and {folders[0]} are both given; read one or the other"
        )
    if not (curves or folders or project):
        raise InputError(
            f"{name} of what? name folders of runs, as outputs, "
            f"or curves, as {layout.cells[0]}=FILE.csv, or --wandb entity/project"
        )
    if (scale or where) and not (folders or project):
        raise InputError("--scale and --where choose among runs, and only curves are given")
    conditions = dict(_key_and_value(text) for text in where)
    runs, notes = runs_of_curves({}), list[str]()
    if project or folders:
        found = runs_of_project(project, name) if project else runs_of_folders(folders)
        runs, notes = select(layout, found, scale=scale, conditions=conditions)
    table = fill(layout, runs, runs_of_curves(curves))
    table.notes += notes
    return table


def _split_sources(
    layout: TableLayout, sources: Sequence[str]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Published curves by cell, and folders, whose names may hold an equals sign."""
    curves: dict[str, list[Path]] = {}
    folders = []
    for source in sources:
        cell, equals, path = source.partition("=")
        if not equals or Path(source).exists() or "/" in cell:
            folders.append(Path(source))
        elif cell in layout.cells:
            curves.setdefault(cell, []).extend(curve_files(Path(path)))
        else:
            raise InputError(
                f"{source}: {layout.name} has no such cell; use one of {', '.join(layout.cells)}"
            )
    return curves, folders


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InputError(f"--where {text} is not key=value, as in --where batch_size.theta=0.6")
    return key, value


# ---- selection


def select(
    layout: TableLayout,
    runs: Runs,
    *,
    scale: str | None = None,
    conditions: Mapping[str, str] | None = None,
) -> tuple[Runs, list[str]]:
    """Choose a table's runs.

    Args:
        layout: of the table.
        runs: of whatever table; may hold sweeps of several variants.
        scale: the scale to take, where the runs have several.
        conditions: settings that the runs must have, as they are typed, by dotted name.

    Returns:
        The runs, of which those that are finished count, one for each cell and seed; and a note on
        each that another one of the same cell and seed replaces.

    Raises:
        InputError: no run is left, the scale is not clear, or runs that are to stand for the same
            thing have different settings.
    """
    own = runs[(runs["table"] == layout.name) & runs["cell"].isin(layout.cells)]
    if own.empty:
        tables = sorted(set(map(str, runs["table"].dropna())))
        raise InputError(
            f"none of {len(runs)} runs belongs to {layout.name} (their setting table: "
            f"{', '.join(tables) or 'none'}); train it with python train.py +sweep={layout.name}"
        )
    scales = sorted(own["scale"].unique())
    if scale is None and len(scales) > 1:
        raise InputError(
            f"the runs of {layout.name} have several scales, {', '.join(scales)}; "
            f"choose one, as in --scale {scales[0]}"
        )
    scale = scale or scales[0]
    if scale not in scales:
        raise InputError(
            f"--scale {scale}: no run of {layout.name} has it; they have {', '.join(scales)}"
        )
    own = own[own["scale"] == scale]
    for key, text in (conditions or {}).items():
        own = _where(own, key, text)
    finished = own[own["finished"]].sort_values("name", key=lambda names: names.map(natural_order))
    notes = []
    for cell, runs_of_cell in finished.groupby("cell"):
        _refuse_differences(runs_of_cell, f"of {layout.name}'s cell {cell}")
        for _, repeated in runs_of_cell.groupby("seed"):
            notes += [
                f"not counted: {name}, of the same settings and seed as {later}"
                for name, later in pairwise(repeated["name"])
            ]
    if len(finished):
        _refuse_differences(finished, f"of {layout.name}", groups=COMMON)
    counted = finished.drop_duplicates(["cell", "seed"], keep="last")
    return pd.concat([counted, own[~own["finished"]]]), notes


def _where(runs: Runs, key: str, text: str) -> Runs:
    """Runs with a setting that was asked for; a run that has it without using it may have any."""
    settings = runs["settings"]
    if not any(key in each for each in settings):
        near = difflib.get_close_matches(key, {name for each in settings for name in each}, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"--where {key}={text}: no run has that setting{hint}")
    uses = settings.map(lambda each: _uses(key, each))
    other = uses & ~settings.map(lambda each: _matches(each.get(key), text))
    if uses.any() and (other == uses).all():
        values = sorted({str(each[key]) for each in settings[uses]})
        raise InputError(f"--where {key}={text}: no run has it; they have {', '.join(values)}")
    return runs[~other]


def _uses(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run has a setting and uses it: a constant batch has a theta that it does not."""
    may_be_idle = key.startswith(("batch_size.", "noise_scale."))
    return key in settings and (not may_be_idle or decides(key, settings, Purpose.CURVE))


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


def _refuse_differences(runs: Runs, what: str, *, groups: Sequence[str] = ("",)) -> None:
    """Refuse runs that cannot stand together.

    Args:
        runs: that have to agree in what decides their losses.
        what: they have in common.
        groups: settings or groups of them to compare; "" is all.

    Raises:
        InputError: names two runs, and the settings that differ.
    """
    names = list(runs["name"])
    first, *others = (deciding_settings(each, Purpose.CURVE) for each in runs["settings"])
    for name, other in zip(names[1:], others, strict=True):
        keys = [
            key
            for key in differing_settings(first, other)
            if any(group in ("", key) or key.startswith(group + ".") for group in groups)
        ]
        if keys:
            shown = [f"{key}: {first.get(key)} and {other.get(key)}" for key in keys[:SHOWN]]
            more = ["..."] if len(keys) > SHOWN else []
            raise InputError(
                f"two runs {what} have different settings, {names[0]} and {name} "
                f"({', '.join(shown + more)}); choose, as in "
                f"--where {keys[0]}={first.get(keys[0])}"
            )


# ---- statistics


def by_cell(runs: Runs) -> dict[str, pd.DataFrame]:
    """Runs of each cell by seed, with their losses read.

    The columns beside the frame's: `losses` (a curve over steps), `lowest` (nats per token) and
    `lowest_step`, the first that has it.
    """
    if runs.empty:
        return {}
    losses = read_losses(runs)
    read = runs.assign(
        losses=losses,
        lowest=losses.map(lambda curve: curve.min()),
        lowest_step=losses.map(lambda curve: curve.idxmin()),
    )
    return {cell: of_cell.set_index("seed").sort_index() for cell, of_cell in read.groupby("cell")}


def minimum_loss(runs: pd.DataFrame) -> Statistic:
    """Mean and sample standard deviation over seeds of the lowest validation loss."""
    lowest = list(runs["lowest"])
    return Statistic(fmean(lowest), stdev(lowest) if len(runs) > 1 else None, _seeds(runs))


def median_steps(runs: pd.DataFrame) -> Statistic:
    """Median over seeds of the steps that the token budget takes."""
    return Statistic(float(median(runs["steps"])), seeds=_seeds(runs))


def reduction_by_first_reaching(adaptive: pd.DataFrame, baseline: pd.DataFrame) -> Statistic:
    """Median of 100 (1 - a / b), in percent, over the seeds that reach.

    a is the step at which the adaptive run first has the baseline's lowest loss, b the step at
    which the baseline of the same seed has it.
    """
    pairs = paired(adaptive, baseline)
    reductions = [
        100 * (1 - reached.index[0] / pair.lowest_step_baseline)
        for pair in pairs.itertuples()
        if len(reached := pair.losses[pair.losses <= pair.lowest_baseline])
    ]
    value = float(median(reductions)) if reductions else None
    return Statistic(value, seeds=_seeds(pairs), reached=len(reductions))


def reduction_by_total_steps(adaptive: pd.DataFrame, baseline: pd.DataFrame) -> Statistic:
    """Median of 100 (1 - a / b), in percent; a and b are all steps of either run."""
    pairs = paired(adaptive, baseline)
    reductions = 100 * (1 - pairs["steps"] / pairs["steps_baseline"])
    return Statistic(float(reductions.median()), seeds=_seeds(pairs))


def paired(adaptive: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Runs of the same seed side by side; the baseline's columns end in _baseline."""
    return adaptive.join(baseline.add_suffix("_baseline"), how="inner").sort_index()


def _seeds(runs: pd.DataFrame) -> tuple[int, ...]:
    return tuple(int(seed) for seed in runs.index)


# ---- filling


def fill(layout: TableLayout, runs: Runs, published: Runs) -> FilledTable:
    """Compute every entry.

    Args:
        layout: of the table.
        runs: the table's, as `select` returns them.
        published: curves in place of runs, as `runs_of_curves` reads them.

    Raises:
        InputError: a cell has both, or nothing has any.
    """
    is_finished = runs["finished"].astype(bool)
    unfinished = list(runs["name"][~is_finished])
    ours, theirs = by_cell(runs[is_finished]), by_cell(published)
    for cell in theirs.keys() & ours:
        raise InputError(
            f"{cell} is given as a published curve, and by runs such as "
            f"{ours[cell]['name'].iloc[0]}; leave one of them out"
        )
    if not (theirs or ours):
        raise InputError(
            f"no run of {layout.name} is finished, {len(unfinished)} are not; start "
            "their commands again to finish them"
        )
    cells = ours | theirs
    scale = runs["scale"].iloc[0] if ours else None
    seeds = sorted({seed for of_cell in ours.values() for seed in of_cell.index})
    missing = {
        cell: lacking
        for cell in layout.cells
        if cell in ours and (lacking := [seed for seed in seeds if seed not in ours[cell].index])
    }

    def shown(label: Label, entries: Iterable[Entry]) -> str:
        first = [ours[entry.cell]["settings"].iloc[0] for entry in entries if entry.cell in ours]
        return _shown(label, first, scale)

    def filled(entry: Entry) -> FilledEntry:
        incomplete = {entry.cell, entry.baseline} & missing.keys()
        statistic = statistic_of(entry, cells)
        marked = statistic is not None and bool(incomplete or _unpaired(entry, cells))
        return FilledEntry(entry, statistic, marked)

    return FilledTable(
        layout=layout,
        scale=scale,
        headers=[
            (group, shown(title, [entries[number] for _, entries in layout.rows]))
            for number, (group, title) in enumerate(layout.columns)
        ],
        rows=[
            FilledRow(tuple(shown(label, entries) for label in labels), tuple(map(filled, entries)))
            for labels, entries in layout.rows
        ],
        notes=[
            *_notes(layout, cells, missing),
            *(f"not counted, unfinished: {name}" for name in unfinished),
        ],
    )


def statistic_of(entry: Entry, cells: Cells) -> Statistic | None:
    """An entry's number; None where it has no runs."""
    runs = cells.get(entry.cell)
    if runs is None:
        return None
    if entry.baseline is None:
        return minimum_loss(runs) if entry.quantity == "loss" else median_steps(runs)
    baseline = cells.get(entry.baseline)
    if baseline is None or paired(runs, baseline).empty:
        return None
    if entry.quantity == "total_steps":
        return reduction_by_total_steps(runs, baseline)
    return reduction_by_first_reaching(runs, baseline)


def _unpaired(entry: Entry, cells: Cells) -> list[int]:
    """Seeds that the adaptive runs or the baseline have alone."""
    runs, baseline = cells.get(entry.cell), cells.get(entry.baseline or "")
    if runs is None or baseline is None:
        return []
    return sorted(runs.index.symmetric_difference(baseline.index))


def _shown(label: Label, settings: Sequence[Mapping[str, Any]], scale: str | None) -> str:
    """A label with the setting of its runs, the paper's, or the role."""
    if label.key is None:
        return label.text
    values = sorted({each[label.key] for each in settings if label.key in each})
    if not values and scale is None:
        return label.text.format(label.paper)
    return label.text.format(" or ".join(str(value) for value in values) or label.role)


def _notes(layout: TableLayout, cells: Cells, missing: Mapping[str, list[int]]) -> list[str]:
    notes = []
    if absent := [cell for cell in layout.cells if cell not in cells]:
        notes.append(f"no run: {', '.join(absent)}")
    notes += [f"* missing seeds: {cell} lacks {_listed(lack)}" for cell, lack in missing.items()]
    notes += [
        f"* not paired: {entry.cell} and {entry.baseline} do not both have seeds {_listed(alone)}"
        for entry in layout.entries
        if entry.quantity == "first_reaching" and (alone := _unpaired(entry, cells))
    ]
    return notes


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)
