"""A table of the paper made of runs: choose them, compute its numbers, note what is missing.

Runs are never mixed silently: those that stand for one cell have the same settings, the seed
aside, and all runs of a table share what makes its numbers comparable. Steps are optimizer steps;
runs that are compared have the same seed.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.data.embedded_images import NAME as EMBEDDED_IMAGES
from gns_pretrain.errors import InputError, counted
from gns_pretrain.fields import at_home
from gns_pretrain.results.frame import (
    Runs,
    hours_of,
    pd,
    runs_of_curves,
    runs_of_folders,
    runs_of_project,
    shown_score,
    with_losses,
)
from gns_pretrain.results.labels import curve_files, natural_order
from gns_pretrain.results.layouts import (
    LAYOUTS,
    SCORES,
    Entry,
    Label,
    Quantity,
    Score,
    Statistic,
    TableLayout,
    with_hours,
)
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    decides,
    deciding_settings,
    differing_settings,
)
from gns_pretrain.tracking.unit import IMAGES

Cells = Mapping[str, pd.DataFrame]  # runs of each cell by seed, with their losses (`by_cell`)

# What a number of each kind means, below the table.
MEANING: dict[Quantity, str] = {
    "loss": (
        "validation loss: the lowest of a run's evaluations, nats per token; mean ± sample "
        "standard deviation over seeds"
    ),
    "accuracy": (
        "validation accuracy: the highest of a run's evaluations, percent; mean ± sample standard "
        "deviation over seeds"
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
    "hours": (
        "hours: median over seeds of the wall time of a run's training steps, without evaluations "
        "and checkpoints; comparable where runs had the same machine to themselves"
    ),
    "hours_to_best": (
        "hours to the baseline's best: until the run first has the best score of the baseline of "
        "the same seed; median over the seeds that reach it, - if none does"
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
    "evaluation.num_images",
)
SHOWN = 4  # settings, of all that differ, in an error


@dataclass(frozen=True)
class FilledEntry:
    """An entry with the number of our runs; None without runs."""

    entry: Entry
    statistic: Statistic | None
    marked: bool  # seeds are missing; the notes say which
    best: bool = False  # the best score of those that it stands beside


@dataclass
class FilledTable:
    """A table, ready to be rendered."""

    layout: TableLayout
    scale: str | None  # of its runs; None where it holds published curves alone
    headers: list[tuple[str, str]]  # group and title of each column of entries
    rows: list[tuple[list[str], list[FilledEntry]]]  # labels and entries, from top to bottom
    notes: list[str]  # what is missing or was left out

    @property
    def with_paper(self) -> bool:
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
        if self.layout.unit is IMAGES:
            meanings = [text.replace("per token", "per image") for text in meanings]
        if self.layout.score == "accuracy":
            meanings = [text.replace("lowest loss", "highest accuracy") for text in meanings]
        baseline = [self.layout.baseline] if self.layout.baseline else []
        return [*meanings, *baseline, *([PAPER_MEANING] if self.with_paper else [])]

    @property
    def has_best(self) -> bool:
        return any(entry.best for _, entries in self.rows for entry in entries)


def make_table(
    name: str,
    sources: Sequence[str] = (),
    *,
    scale: str | None = None,
    where: Sequence[str] = (),
    project: str | None = None,
    hours: bool = False,
) -> FilledTable:
    """Read runs, choose those of a table and compute its numbers.

    Args:
        name: of a layout.
        sources: folders of runs, and cell=PATH for published curves.
        scale: the scale to take, where the runs have several.
        where: conditions on the settings of runs, each key=value.
        project: of W&B, in place of folders.
        hours: add columns of wall time.

    Raises:
        InputError: whatever keeps the table from being made, in one line.
    """
    layout = with_hours(LAYOUTS[name]) if hours else LAYOUTS[name]
    curves: dict[str, list[Path]] = {}
    folders = []
    for source in map(at_home, sources):
        cell, equals, path = source.partition("=")
        if not equals or Path(source).exists() or "/" in cell:  # a folder may have an = in its name
            folders.append(Path(source))
        elif cell in layout.cells:
            curves.setdefault(cell, []).extend(curve_files(Path(at_home(path))))
        else:
            raise InputError(
                f"{source}: {name} has no such cell; use one of {', '.join(layout.cells)}"
            )
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
    runs, notes = runs_of_curves({}), list[str]()
    damaged = list[str]()
    try:
        if project or folders:
            if project:
                found = runs_of_project(project, name)
            else:
                found, damaged = runs_of_folders(folders)
                _refuse_bare_curves(layout, found, folders)
            runs, notes = select(layout, found, scale=scale, where=where)
            if not project:
                notes += stand_ins(runs)
        table = fill(layout, runs, with_losses(runs_of_curves(curves), layout.score)[0])
    except InputError as error:
        raise InputError("; ".join([str(error), *damaged])) from error
    table.notes += notes + damaged
    return table


# ---- selection


def _refuse_bare_curves(layout: TableLayout, runs: Runs, folders: Sequence[Path]) -> None:
    """Raise InputError where folders hold CSVs in place of runs: no CSV names its cell."""
    curves = [path for folder in folders for path in sorted(folder.rglob("*.csv"))]
    if runs.empty and curves:
        raise InputError(
            f"{folders[0]}: no run, but {counted(len(curves), 'CSV file')}, none of which says "
            f"what it is; name its cell, as in {layout.cells[0]}={curves[0]} "
            f"(cells: {', '.join(layout.cells)})"
        )


def select(
    layout: TableLayout,
    runs: Runs,
    *,
    scale: str | None,
    where: Sequence[str],
) -> tuple[Runs, list[str]]:
    """Choose a table's runs among those of whatever table; `scale` and `where` as for make_table.

    Returns:
        The runs, of which those that are finished count, one for each cell and seed, with their
        `losses`; and a note on each that another one of the same cell and seed replaces, or that
        cannot be read.

    Raises:
        InputError: no run is left, the scale is not clear, or runs that are to stand for the same
            thing have different settings.
    """
    own = runs[(runs["table"] == layout.name) & runs["cell"].isin(layout.cells)]
    if own.empty:
        tables = sorted(set(map(str, runs["table"].dropna())))
        raise InputError(
            f"none of {counted(len(runs), 'run')} belongs to {layout.name} (their setting table: "
            f"{', '.join(tables) or 'none'}); train it with gns-pretrain train +sweep={layout.name}"
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
    for condition in where:
        own = _where(own, condition)
    finished = own[own["finished"]].sort_values("name", key=lambda names: names.map(natural_order))
    finished, notes = with_losses(finished, layout.score)
    for cell, runs_of_cell in finished.groupby("cell"):
        _refuse_differences(runs_of_cell, f"of {layout.name}'s cell {cell}")
        for _, repeated in runs_of_cell.groupby("seed"):
            notes += [
                f"not counted: {name}, of the same settings and seed as {later}"
                for name, later in pairwise(repeated["name"])
            ]
    if len(finished):
        _refuse_differences(finished, f"of {layout.name}", COMMON)
    kept = finished.drop_duplicates(["cell", "seed"], keep="last")
    return pd.concat([kept, own[~own["finished"]]]), notes


def stand_ins(runs: Runs) -> list[str]:
    """A note on each image set that was not there, so that runs took the embedded one."""
    named = set()
    for directory, settings in zip(runs["name"], runs["settings"], strict=True):
        if settings.get("data.or_embedded") and FINGERPRINT in settings:  # there is a run.json
            origin = read_provenance(Path(directory)).get("data", {})
            if Path(origin.get("folder", "")).name.startswith(EMBEDDED_IMAGES):
                named.add(settings["data.path"])
    return [f"trained on the embedded digits: {path} was not there" for path in sorted(named)]


def _where(runs: Runs, condition: str) -> Runs:
    """Runs with a setting that was asked for; a run that has it without using it may have any."""
    key, equals, text = condition.partition("=")
    if not (key and equals):
        raise InputError(
            f"--where {condition} is not key=value, as in --where batch_size.theta=0.6"
        )
    settings = runs["settings"]
    if not any(key in each for each in settings):
        near = difflib.get_close_matches(key, {name for each in settings for name in each}, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"--where {condition}: no run has that setting{hint}")
    # A constant batch has a theta that it does not use.
    may_be_idle = key.startswith(("batch_size.", "noise_scale."))
    uses = settings.map(
        lambda each: key in each and (not may_be_idle or decides(key, each, Purpose.CURVE))
    )
    other = uses & ~settings.map(lambda each: _matches(each.get(key), text))
    if uses.any() and (other == uses).all():
        values = sorted({str(each[key]) for each in settings[uses]})
        raise InputError(f"--where {condition}: no run has it; they have {', '.join(values)}")
    return runs[~other]


def _matches(value: Any, text: str) -> bool:
    """Whether a setting has a value as it is typed: 1e-3, true, [plug_in]."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(text.replace("_", "")) == value
        return text == str(value) or bool(yaml.safe_load(text) == value)
    except (ValueError, yaml.YAMLError):
        return False


def _refuse_differences(runs: Runs, what: str, groups: Sequence[str] | None = None) -> None:
    """Refuse runs that cannot stand together: they differ in what decides their losses.

    Args:
        runs: to compare.
        what: they have in common.
        groups: settings or groups of them to compare; None is all.

    Raises:
        InputError: names two runs, and the settings that differ.
    """
    names = list(runs["name"])
    first, *others = (deciding_settings(each, Purpose.CURVE) for each in runs["settings"])
    for name, other in zip(names[1:], others, strict=True):
        keys = [
            key
            for key in differing_settings(first, other)
            if groups is None or any(f"{key}.".startswith(f"{group}.") for group in groups)
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
    """Runs of each cell by seed, with their `losses` (a curve over steps).

    `lowest` is the lowest of them (nats; of an accuracy the errors in percent), `lowest_step` the
    first step that has it.
    """
    if runs.empty:
        return {}
    read = runs.assign(
        lowest=runs["losses"].map(lambda curve: curve.min()),
        lowest_step=runs["losses"].map(lambda curve: curve.idxmin()),
    )
    return {cell: of_cell.set_index("seed").sort_index() for cell, of_cell in read.groupby("cell")}


def best_score(runs: pd.DataFrame, score: Score) -> Statistic:
    """Mean and sample standard deviation over seeds of the lowest loss or highest accuracy."""
    best = [shown_score(score, value) for value in runs["lowest"]]
    deviation = stdev(best) if len(runs) > 1 else None
    return Statistic(fmean(best), deviation, tuple(runs.index.tolist()))


def median_steps(runs: pd.DataFrame) -> Statistic:
    """Median over seeds of the steps that the token budget takes."""
    return Statistic(float(median(runs["steps"])), seeds=tuple(runs.index.tolist()))


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
    return Statistic(value, seeds=tuple(pairs.index.tolist()), reached=len(reductions))


def reduction_by_total_steps(adaptive: pd.DataFrame, baseline: pd.DataFrame) -> Statistic:
    """Median of 100 (1 - a / b), in percent; a and b are all steps of either run."""
    pairs = paired(adaptive, baseline)
    reductions = 100 * (1 - pairs["steps"] / pairs["steps_baseline"])
    return Statistic(float(reductions.median()), seeds=tuple(pairs.index.tolist()))


def median_hours(runs: pd.DataFrame) -> Statistic:
    """Median over seeds of the hours of all steps; None where no record holds any."""
    totals = [hours.iloc[-1] for hours in map(hours_of, runs["name"]) if len(hours)]
    return Statistic(median(totals) if totals else None, seeds=tuple(runs.index.tolist()))


def hours_to_best(runs: pd.DataFrame, baseline: pd.DataFrame) -> Statistic:
    """Median of the hours until a run first has the baseline's best score, where it does."""
    pairs = paired(runs, baseline)
    found: list[float] = []
    for pair in pairs.itertuples():
        reached = pair.losses.index[pair.losses <= pair.lowest_baseline]
        if len(reached):
            found += list(hours_of(pair.name).loc[: reached[0]].iloc[-1:])
    value = float(median(found)) if found else None
    return Statistic(value, seeds=tuple(pairs.index.tolist()), reached=len(found))


def paired(adaptive: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Runs of the same seed side by side; the baseline's columns end in _baseline."""
    return adaptive.join(baseline.add_suffix("_baseline"), how="inner").sort_index()


# ---- filling


def fill(layout: TableLayout, runs: Runs, published: Runs) -> FilledTable:
    """Compute every entry from `select`'s runs and, in place of runs, from published curves.

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
        cell: ", ".join(lacking)
        for cell in layout.cells
        if cell in ours
        and (lacking := [str(seed) for seed in seeds if seed not in ours[cell].index])
    }

    def shown(label: Label, entries: Iterable[Entry]) -> str:
        """A label with the setting of its runs, the paper's, or the role."""
        if isinstance(label, str):
            return label
        first = [ours[entry.cell]["settings"].iloc[0] for entry in entries if entry.cell in ours]
        values = sorted({each[label.key] for each in first if label.key in each})
        if not values and scale is None:
            return label.text.format(label.paper)
        return label.text.format(" or ".join(map(str, values)) or label.role)

    def filled(entry: Entry) -> FilledEntry:
        incomplete = {entry.cell, entry.baseline} & missing.keys()
        statistic = statistic_of(entry, cells)
        marked = statistic is not None and bool(incomplete or _unpaired(entry, cells))
        return FilledEntry(entry, statistic, marked)

    absent = [cell for cell in layout.cells if cell not in cells]
    rows = [list(map(filled, entries)) for _, entries in layout.rows]
    return FilledTable(
        layout=layout,
        scale=scale,
        headers=[
            (group, shown(title, [entries[number] for _, entries in layout.rows]))
            for number, (group, title) in enumerate(layout.columns)
        ],
        rows=[
            ([shown(label, _named_by_labels(entries)) for label in labels], marked)
            for (labels, entries), marked in zip(layout.rows, with_best(rows), strict=True)
        ],
        notes=[
            *([f"no run: {', '.join(absent)}"] if absent else []),
            *(f"* missing seeds: {cell} lacks {lacking}" for cell, lacking in missing.items()),
            *(
                f"* not paired: {entry.cell} and {entry.baseline} do not both have seeds {alone}"
                for entry in layout.entries
                if entry.quantity == "first_reaching" and (alone := _unpaired(entry, cells))
            ),
            *(f"not counted, unfinished: {name}" for name in unfinished),
        ],
    )


def _named_by_labels(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Those of a row whose settings its labels show: not the baseline's, where it has one."""
    return [entry for entry in entries if entry.baseline] or entries


def with_best(rows: Sequence[Sequence[FilledEntry]]) -> list[list[FilledEntry]]:
    """Mark the best mean score of each row; of the column, where a row has a single score."""

    def scores(entries: Iterable[FilledEntry]) -> list[float]:
        found = [e.statistic for e in entries if e.entry.quantity in SCORES and e.statistic]
        return [statistic.value for statistic in found if statistic.value is not None]

    column = [entry for row in rows for entry in row]
    one_a_row = max(sum(e.entry.quantity in SCORES for e in row) for row in rows) == 1
    is_accuracy = any(entry.entry.quantity == "accuracy" for entry in column)
    marked = []
    for row in rows:
        compared = scores(column if one_a_row else row)
        best = (max if is_accuracy else min)(compared) if len(compared) > 1 else None
        marked.append([replace(e, best=best is not None and scores([e]) == [best]) for e in row])
    return marked


def statistic_of(entry: Entry, cells: Cells) -> Statistic | None:
    """An entry's number; None where it has no runs."""
    runs, baseline = cells.get(entry.cell), cells.get(entry.baseline or "")
    if runs is None:
        return None
    if entry.quantity == "hours":
        return median_hours(runs)
    if entry.baseline is None:
        if entry.quantity == "loss" or entry.quantity == "accuracy":
            return best_score(runs, entry.quantity)
        return median_steps(runs)
    if baseline is None or paired(runs, baseline).empty:
        return None
    if entry.quantity == "hours_to_best":
        return hours_to_best(runs, baseline)
    if entry.quantity == "total_steps":
        return reduction_by_total_steps(runs, baseline)
    return reduction_by_first_reaching(runs, baseline)


def _unpaired(entry: Entry, cells: Cells) -> str:
    """Seeds that the adaptive runs or the baseline have alone."""
    runs, baseline = cells.get(entry.cell), cells.get(entry.baseline or "")
    if runs is None or baseline is None:
        return ""
    return ", ".join(map(str, sorted(runs.index.symmetric_difference(baseline.index))))
