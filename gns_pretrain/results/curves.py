"""Curves of a run over steps or tokens: from its own record, or from a published CSV."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gns_pretrain.errors import InputError
from gns_pretrain.results.reading import (
    BATCH_SIZE,
    LEARNING_RATE,
    PUBLISHED_AVERAGE,
    STEP,
    TOKENS,
    Table,
)
from gns_pretrain.runs.directory import CONFIG, METRICS, read_settings, run_directories
from gns_pretrain.tracking.jsonl import read_records

AXES = {"step": STEP, "tokens": TOKENS}
NOISE_SCALE = "noise_scale"
# Quantity: kind and key of a record's line, and its columns in a CSV, ours first.
QUANTITIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "loss": ("validation", "loss", ("val/loss", "validation_metrics/loss")),
    "train_loss": ("train", "loss", ("train/loss", "loss_metrics/global_avg_loss")),
    "batch_size": ("train", "batch_size", BATCH_SIZE),
    "lr": ("train", "lr", LEARNING_RATE),
    NOISE_SCALE: ("noise", "noise_scale_ema", (PUBLISHED_AVERAGE,)),
}
Noise = tuple[str, str]  # geometry and estimate of a noise scale


@dataclass(frozen=True)
class Curve:
    """A quantity along a run.

    Args:
        x: [points], float64, ascending; steps or tokens.
        y: [points], float64; a loss in nats per token, a batch size or noise scale in sequences.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> "Curve":
        """Points in the order of a record; what a resumed run did again replaces the earlier."""
        kept: list[tuple[float, float]] = []
        for point in points:
            while kept and kept[-1][0] >= point[0]:
                kept.pop()
            kept.append(point)
        pairs = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])


def read_curves(path: Path, *, axis: str = "step", noise: Noise | None = None) -> dict[str, Curve]:
    """All curves that a run directory or a CSV holds, by quantity (QUANTITIES).

    Args:
        path: a run directory, finished or not, or a CSV.
        axis: step or tokens.
        noise: whose noise scale; None takes the one that chose the batch, else the first there is.

    Raises:
        InputError: the file cannot be read, or has no such axis.
    """
    if path.is_dir():
        records = read_records(path / METRICS)
        return curves_of_records(records, axis=axis, noise=noise or policy_noise(path, records))
    return curves_of_csv(path, axis=axis, noise=noise)


def curves_of_records(
    records: list[dict[str, Any]], *, axis: str = "step", noise: Noise | None = None
) -> dict[str, Curve]:
    """Likewise, from the lines of a metrics.jsonl."""
    tokens_at = {line["step"]: line["tokens"] for line in records if "tokens" in line}
    found = {}
    for quantity, (kind, key, _) in QUANTITIES.items():
        points = [
            (line["step"] if axis == "step" else tokens_at[line["step"]], line[key])
            for line in records
            if line["kind"] == kind
            and line.get(key) is not None
            and (axis == "step" or line["step"] in tokens_at)
            and (kind != "noise" or noise in (None, (line["geometry"], line["estimate"])))
        ]
        if points:
            found[quantity] = Curve.through(points)
    return found


def policy_noise(directory: Path, records: list[dict[str, Any]]) -> Noise | None:
    """Geometry and estimate that chose a run's batch; else the first that was measured."""
    measured = [(r["geometry"], r["estimate"]) for r in records if r["kind"] == "noise"]
    policy = read_settings(directory).get("batch_size") or {}
    own = (policy.get("geometry"), policy.get("estimate"))
    return own if own in measured else next(iter(measured), None)


def curves_of_csv(
    path: Path, *, axis: str = "step", noise: Noise | None = None
) -> dict[str, Curve]:
    """Likewise, from a published curve or a W&B export."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; name a run directory or a CSV")
    table = Table.read(path, None)
    x = table.require(AXES[axis])
    found = {}
    for quantity, (_, _, names) in QUANTITIES.items():
        if quantity == NOISE_SCALE:
            names = (*_noise_columns(table, noise), *names)
        column = table.find(names)
        points = [
            (at, value)
            for index in range(len(table.rows))
            if (at := table.number(index, x)) is not None
            and (value := table.number(index, column)) is not None
        ]
        if points:
            found[quantity] = Curve.through(points)
    if not found:
        raise InputError(f"{path} holds no curve; it has {', '.join(table.columns) or 'nothing'}")
    return found


def _noise_columns(table: Table, noise: Noise | None) -> Iterator[str]:
    """Averaged noise scales under the names that our runs log."""
    if noise is not None:
        yield "noise/{}/{}/noise_scale_ema".format(*noise)
        return
    yield from (name for name in table.columns if re.fullmatch("noise/.*/noise_scale_ema", name))


def curve_files(path: Path) -> list[Path]:
    """Run directories and CSVs that a path names: itself, or what is in it, in natural order.

    Raises:
        InputError: there is nothing of the kind.
    """
    if path.is_file() or (path / CONFIG).is_file() or (path / METRICS).is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; name a run directory or a CSV")
    found = sorted([*run_directories(path), *path.glob("*.csv")], key=natural_order)
    if not found:
        raise InputError(f"{path} holds neither a run directory nor a CSV; name one that does")
    return found


def grouped(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Run directories and CSVs by label, in the order in which labels appear.

    Args:
        arguments: paths, whose runs are grouped by folder and name without the seed, or
            label=PATH.

    Raises:
        InputError: there is no such path.
    """
    groups: dict[tuple[str, str], list[Path]] = {}  # folder (of a given label: none) and name
    for argument in arguments:
        label, given = _label_and_path(argument)
        for path in curve_files(given):
            folder = path.resolve().parent
            name = without_seed(path.resolve())
            members = groups.setdefault((str(folder), name) if label is None else ("", label), [])
            if path not in members:
                members.append(path)
    names = [name for _, name in groups]
    return {
        f"{Path(folder).name}/{name}" if folder and names.count(name) > 1 else name: paths
        for (folder, name), paths in groups.items()
    }


def _label_and_path(argument: str) -> tuple[str | None, Path]:
    """A path, or label=PATH; both may hold further equals signs."""
    if Path(argument).exists() or "=" not in argument:
        return None, Path(argument)
    words = argument.split("=")
    splits = [("=".join(words[:n]), Path("=".join(words[n:]))) for n in range(1, len(words))]
    return next((split for split in splits if split[1].exists()), splits[-1])


def natural_order(path: Path) -> tuple[tuple[int, str], ...]:
    """Sorts seed_10 after seed_9."""
    words = re.findall(r"\d+|\D+", str(path))
    return tuple((int(word), "") if word.isdigit() else (-1, word) for word in words)


def without_seed(path: Path) -> str:
    """Name of a run without its seed; of the folder where a file's name is nothing but one."""
    name = path.stem if path.suffix == ".csv" else path.name
    rest = re.sub(r"(^|[-_])seed[-_]?\d+(?=$|[-_])", "", name).strip("-_")
    return rest or path.parent.name


def seed_in_name(path: Path) -> int | None:
    """The 3 of seed_3.csv or run-seed3."""
    match = re.search(r"(?:^|[-_])seed[-_]?(\d+)(?=$|[-_])", path.stem)
    return int(match[1]) if match else None


# Several seeds of a curve as a mean and a band. Pure functions.

Values = NDArray[np.float64]
MOST_POINTS = 2000  # of a drawn line; more only make the file larger


@dataclass(frozen=True)
class Band:
    """Seeds on a common grid; without a deviation it is a single run.

    Args:
        x: [points]; steps or tokens.
        mean: [points].
        deviation: [points]; sample standard deviation over seeds.
    """

    x: Values
    mean: Values
    deviation: Values | None


def over_seeds(
    curves: Sequence[Curve],
    *,
    transform: Callable[[Values], Values] = np.asarray,
    stepwise: bool = False,
) -> Band:
    """Mean and sample standard deviation of several curves, where all of them are known.

    Runs whose batch adapts were evaluated at different steps: each is interpolated onto all their
    points, from the latest first to the earliest last one.

    Args:
        curves: one a seed.
        transform: of the interpolated values; a perplexity is interpolated as a loss.
        stepwise: interpolate by the value before, as a batch size.

    Raises:
        InputError: they have no range in common.
    """
    if len(curves) == 1:
        return Band(curves[0].x, transform(curves[0].y), None)
    first = max(curve.x[0] for curve in curves)
    last = min(curve.x[-1] for curve in curves)
    if first > last:
        raise InputError(
            f"one seed's curve begins at {first:g}, after another's end at {last:g}; "
            "leave one of them out, or draw --each-seed"
        )
    points = np.unique(np.concatenate([curve.x for curve in curves]))
    grid = points[(points >= first) & (points <= last)]
    values = np.stack([transform(on_grid(curve, grid, stepwise=stepwise)) for curve in curves])
    return Band(grid, values.mean(axis=0), values.std(axis=0, ddof=1))


def on_grid(curve: Curve, grid: Values, *, stepwise: bool) -> Values:
    """A curve at points within its range: [points], float64."""
    if stepwise:
        return curve.y[np.searchsorted(curve.x, grid, side="right") - 1]
    return np.interp(grid, curve.x, curve.y)


def thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """At most MOST_POINTS of the points, evenly, first and last among them."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)
    return x[kept], y[kept]
