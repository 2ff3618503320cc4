"""The runs of one table, one scale and one set of settings; nothing is mixed silently."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.results.curves import natural_order
from gns_pretrain.results.tables.layout import Layout
from gns_pretrain.results.tables.sources import FINGERPRINT, TableRun
from gns_pretrain.run_directory import decides

Conditions = Mapping[str, str]  # dotted setting: value as it is typed
# What tells two runs of a cell apart although they are the same but for the seed.
OWN = ("run_name", "seed", "table", "cell", "batch_size.shadows")
# What a constant batch reads of the groups that measure and choose it.
CONSTANT_READS = ("batch_size.policy", "batch_size.initial")
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
        readers = [run for run in runs if key in run.settings and not _is_unread(key, run.settings)]
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


def _is_unread(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run with a constant batch has this setting without using it.

    Measuring leaves the training bits unchanged, so what it measures does not count either.
    """
    return (
        settings.get("batch_size.policy") == "constant"
        and key.startswith(("batch_size.", "noise_scale."))
        and key not in CONSTANT_READS
    )


def what_counts(run: TableRun) -> dict[str, Any]:
    """Settings that make it another run, the seed aside."""
    return {
        key: value
        for key, value in run.settings.items()
        if key not in OWN
        and decides(key, policy=run.settings.get("batch_size.policy", "constant"))
        and not _is_unread(key, run.settings)
    }


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
        keys = [key for key in (first | other) if first.get(key) != other.get(key)]
        if keys:
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
