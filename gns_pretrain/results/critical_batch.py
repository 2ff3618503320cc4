"""The critical batch, measured by branches of runs (`launch/branches.py`), beside the noise scales.

Each branch of a point trains the same window of tokens at its own batch B. Three definitions of the
largest batch that still pays:

    tolerance   the largest B whose loss after the window is within `tolerance` of the best one's
                (arXiv:2505.23971, Section 3)
    overhead    where reaching the target loss takes 20 % more tokens than at the most frugal batch
                (arXiv:2410.21676, Section 2)
    fit         E_min / S_min of S = S_min + E_min / B, steps to the target loss at each batch
                (arXiv:1812.06162, Eq. 2.11: (S / S_min - 1) (E / E_min - 1) = 1 with E = S B)

A loss is the validation loss, nats per token. All branches of a point, and all seeds, see the same
validation sequences, so that their differences have none of the noise that a training loss would
have to be smoothed for. The target loss is the highest after the window over the branches that
took at least MIN_STEPS steps: each of them reaches it. Batches are in sequences.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
from rich import box

from gns_pretrain.errors import InputError, counted, needs
from gns_pretrain.results.figures import COLORS, DASHES, PANEL_INCHES, STYLE, save
from gns_pretrain.results.frame import (
    Runs,
    pd,
)
from gns_pretrain.results.labels import without_seed
from gns_pretrain.results.render import markdown, text_grid
from gns_pretrain.runs.branches import MIN_STEPS, TABLE, step_of_window
from gns_pretrain.runs.directory import METRICS
from gns_pretrain.runs.identity import Purpose, deciding_settings
from gns_pretrain.tracking.console import short_number
from gns_pretrain.tracking.jsonl import read_records

Curve: TypeAlias = tuple[tuple[int, int, float], ...]  # steps and tokens from the point, loss

OVERHEAD = 0.2
# What differs between the branches of one point, or follows from it.
OF_THE_BRANCH = ("init.from", "optimizer.lr", "optimizer.adamw.lr", "batch_size.initial")
OF_THE_POINT = (*OF_THE_BRANCH, "token_budget", "evaluation.every_tokens", "micro_batch_size")


@dataclass(frozen=True)
class Branch:
    """One batch at one point, over seeds."""

    batch_size: int
    lr: float  # peak; of the scaling with the lowest loss
    steps: int  # in the window
    losses: tuple[float, ...]  # after the window, a seed each
    curves: tuple[Curve, ...]  # a seed each

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def standard_error(self) -> float | None:
        """Of the mean loss over seeds; None for one seed."""
        return stdev(self.losses) / len(self.losses) ** 0.5 if len(self.losses) > 1 else None


@dataclass(frozen=True)
class CriticalBatch:
    """What the branches of one point say."""

    source: str  # its name without the seed
    tokens: int  # of the source there
    batch_size: int | None  # of the source there; None where its record is gone
    window: int  # tokens
    branches: tuple[Branch, ...]  # by batch size
    # The source's averages there, by geometry/estimate; mean over seeds.
    noise_scales: Mapping[str, float]
    by_tolerance: float | None
    by_overhead: float | None
    by_fit: float | None
    notes: tuple[str, ...]


def largest_within(losses: Mapping[int, float], tolerance: float) -> int:
    """The largest batch whose loss is within `tolerance` of the lowest one."""
    best = min(losses.values())
    return max(size for size, loss in losses.items() if loss <= best + tolerance)


def steps_to(curve: Sequence[tuple[int, int, float]], target: float) -> float | None:
    """Steps until a loss is first reached, between evaluations by a line; None if it never is."""
    before: tuple[int, float] | None = None
    for step, _, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return None


def fit_of_steps(steps: Mapping[int, float]) -> tuple[float, float] | None:
    """S_min and E_min of S = S_min + E_min / B, by least squares of the relative error.

    None where fewer than three batches reach the target, or the best fit has no bend: one of the
    two would not be positive.
    """
    if len(steps) < 3:
        return None
    sizes, counts = np.array(list(steps), float), np.array(list(steps.values()), float)
    design = np.stack([1.0 / counts, 1.0 / (sizes * counts)], axis=1)
    (s_min, e_min), *_ = np.linalg.lstsq(design, np.ones_like(counts), rcond=None)
    return (float(s_min), float(e_min)) if s_min > 0 and e_min > 0 else None


def batch_of_overhead(steps: Mapping[int, float], overhead: float = OVERHEAD) -> float | None:
    """Where E = S B first exceeds its lowest value by `overhead`, above that batch.

    Between batches E is taken as linear in log B; None where no batch exceeds it.
    """
    sizes = sorted(steps)
    samples = [steps[size] * size for size in sizes]
    limit = min(samples) * (1.0 + overhead)
    for index in range(samples.index(min(samples)) + 1, len(sizes)):
        low, high = samples[index - 1], samples[index]
        if high > limit:
            share = (limit - low) / (high - low)
            return float(sizes[index - 1] * (sizes[index] / sizes[index - 1]) ** share)
    return None


def critical_batches(runs: Runs, *, tolerance: float) -> list[CriticalBatch]:
    """One for each point of each source, seeds together, in order of tokens.

    Raises:
        InputError: no run is a finished branch.
    """
    own = runs[(runs["table"] == TABLE) & runs["finished"]]
    if own.empty:
        raise InputError(
            f"none of {counted(len(runs), 'run')} is a finished branch; train them with "
            "gns-pretrain train +sweep=critical_batch hydra.sweeper.source=outputs/NAME"
        )
    rows = [_branch_row(Path(run.name), run.settings) for run in own.itertuples()]
    frame = pd.DataFrame(rows)
    points = frame.groupby(["experiment", "start", "window"], sort=False)
    found = [_measured(point, tolerance) for _, point in points]
    return sorted(found, key=lambda each: (each.source, each.tokens))


def _branch_row(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a branch's record says."""
    records = read_records(directory / METRICS)
    first = next(line for line in records if line["kind"] == "train")
    start = first["tokens"] - settings["batch_size.initial"] * settings["data.sequence_length"]
    checkpoint = Path(settings["init.from"])
    source = checkpoint.parents[1]
    deciding = deciding_settings(settings, Purpose.CURVE)
    return {
        "experiment": repr(sorted((k, v) for k, v in deciding.items() if k not in OF_THE_POINT)),
        "start": start,
        "window": settings["token_budget"] - start,
        "source": source if source.exists() else directory.parent / source.name,
        "at": first["step"] - 1,
        "batch_size": settings["batch_size.initial"],
        "lr": first["lr"],
        "curve": _curve(records, first["step"] - 1, start),
    }


def _curve(records: list[dict[str, Any]], step: int, start: int, window: float = inf) -> Curve:
    """The validation losses of a window."""
    return tuple(
        (line["step"] - step, line["tokens"] - start, line["loss"])
        for line in records
        if line["kind"] == "validation" and 0 < line["tokens"] - start <= window
    )


def _measured(point: pd.DataFrame, tolerance: float) -> CriticalBatch:
    """One point's branches, those of all seeds together."""
    first = point.iloc[0]
    start, window = int(first["start"]), int(first["window"])
    rows = list(point[["source", "batch_size", "lr", "curve"]].itertuples(index=False, name=None))
    own_sizes: set[int] = set()
    noise: dict[str, dict[Path, float]] = {}
    for source, at in point[["source", "at"]].drop_duplicates().itertuples(index=False, name=None):
        records = read_records(source / METRICS) if source.is_dir() else []
        if own := step_of_window(records, start, window):
            curve = _curve(records, at, start, window)
            rows.append((source, own["batch_size"], own["lr"], curve))
        for line in records:
            if line["kind"] == "train" and line["step"] == at:
                own_sizes.add(line["batch_size"])
            if line["kind"] == "noise" and line["step"] <= at:
                of_sources = noise.setdefault(f"{line['geometry']}/{line['estimate']}", {})
                of_sources.pop(source, None)  # where there is none at the point, an older is none
                if line["noise_scale_ema"]:
                    of_sources[source] = line["noise_scale_ema"]
    frame = pd.DataFrame(rows, columns=["source", "batch_size", "lr", "curve"])
    branches = tuple(_best_rate(of_size) for _, of_size in frame.groupby("batch_size"))
    counted_ones = [branch for branch in branches if branch.steps >= MIN_STEPS]
    losses = {branch.batch_size: branch.loss for branch in counted_ones}
    by_tolerance = by_overhead = by_fit = None
    if len(losses) > 1:
        by_tolerance = float(largest_within(losses, tolerance))
        target = max(losses.values())
        reached = {b.batch_size: _mean_steps(b, target) for b in counted_ones}
        steps = {size: count for size, count in reached.items() if count is not None}
        by_overhead = batch_of_overhead(steps) if len(steps) > 1 else None
        if (fit := fit_of_steps(steps)) is not None:
            by_fit = fit[1] / fit[0]
    return CriticalBatch(
        source=without_seed(first["source"]),
        tokens=start,
        batch_size=min(own_sizes, default=None),
        window=window,
        branches=branches,
        noise_scales={
            name: fmean(values.values()) for name, values in sorted(noise.items()) if values
        },
        by_tolerance=by_tolerance,
        by_overhead=by_overhead,
        by_fit=by_fit,
        notes=tuple(_notes(branches, losses, by_tolerance, tolerance)),
    )


def _best_rate(of_size: pd.DataFrame) -> Branch:
    """The branch of one batch size, at the learning rate whose mean loss over seeds is lowest."""
    candidates = []
    for lr, seeds in of_size.groupby("lr"):
        curves = tuple(seeds["curve"])
        steps, losses = curves[0][-1][0], tuple(curve[-1][2] for curve in curves)
        size = int(seeds["batch_size"].iloc[0])
        candidates.append(Branch(size, float(lr), steps, losses, curves))
    return min(candidates, key=lambda branch: branch.loss)


def _mean_steps(branch: Branch, target: float) -> float | None:
    """Steps to a mean loss over seeds; None if a seed is not there yet."""
    mean = [
        (points[0][0], points[0][1], fmean(loss for _, _, loss in points))
        for points in zip(*branch.curves, strict=False)
    ]
    return steps_to(mean, target)


def _notes(
    branches: Sequence[Branch],
    losses: Mapping[int, float],
    by_tolerance: float | None,
    tolerance: float,
) -> Iterator[str]:
    """What the window is too short to tell."""
    for branch in branches:
        if branch.steps < MIN_STEPS:
            yield (
                f"B = {branch.batch_size:,} took {counted(branch.steps, 'step')}, fewer than "
                f"{MIN_STEPS}, and does not count: use a longer window"
            )
    if len(losses) < 2:
        yield "fewer than two branches count: the window is too short to tell"
        return
    errors = [b.standard_error for b in branches if b.batch_size in losses]
    known = [error for error in errors if error is not None]
    if not known:
        yield "one seed: whether differences are noise is not known"
    elif max(known) > tolerance:
        yield (
            f"the standard error over seeds, up to {max(known):.4f}, is above the tolerance "
            f"{tolerance:g}: use more seeds or a longer window"
        )
    if by_tolerance == max(losses):
        yield "the largest batch is within the tolerance: the critical batch may be larger"
    elif by_tolerance == min(losses):
        yield "only the smallest batch is within the tolerance: the critical batch may be smaller"


HEADERS = ("batch size", "steps", "learning rate", "validation loss", "above the best")
DEFINITIONS = {"by_tolerance": "tolerance", "by_overhead": "20 % overhead", "by_fit": "fit"}


def _table(found: CriticalBatch) -> tuple[str, list[list[str]], list[str]]:
    """Title, the cells of each branch, and the lines below them."""
    best = min(branch.loss for branch in found.branches)
    lines = []
    for branch in found.branches:
        loss = f"{branch.loss:.4f}"
        if branch.standard_error is not None:
            loss += f" ± {branch.standard_error:.4f}"
        own = " (the source's)" if branch.batch_size == found.batch_size else ""
        cells = [f"{branch.batch_size:,}{own}", f"{branch.steps:,}", f"{branch.lr:.3g}", loss]
        lines.append([*cells, f"{branch.loss - best:+.4f}"])
    seeds = counted(max(len(branch.losses) for branch in found.branches), "seed")
    title = (
        f"{found.source} at {found.tokens:,} tokens, branches of {found.window:,} tokens, {seeds}"
    )
    critical = [f"{name} {_size(getattr(found, field))}" for field, name in DEFINITIONS.items()]
    noise = [f"{name} {_size(value)}" for name, value in found.noise_scales.items()]
    below = [
        f"critical batch (sequences): {', '.join(critical)}",
        f"noise scales (sequences): {', '.join(noise) or 'not measured by the source'}",
    ]
    return title, lines, [*below, *found.notes]


def _size(value: float | None) -> str:
    return "not found" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def as_text(found: Sequence[CriticalBatch]) -> str:
    """For a terminal."""
    blocks = []
    for each in found:
        title, lines, below = _table(each)
        grid = text_grid(HEADERS, lines, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        blocks.append("\n".join([grid, *below, ""]))
    return "\n".join(blocks)


def as_markdown(found: Sequence[CriticalBatch]) -> str:
    blocks = []
    for each in found:
        title, lines, below = _table(each)
        blocks.append(markdown(title, HEADERS, lines, below))
    return "\n".join(blocks)


def as_json(found: Sequence[CriticalBatch]) -> str:
    """All fields, with each branch's mean loss and standard error."""

    def branch(each: Branch) -> dict[str, Any]:
        return asdict(each) | {"loss": each.loss, "standard_error": each.standard_error}

    objects = [asdict(each) | {"branches": [*map(branch, each.branches)]} for each in found]
    return json.dumps(objects, indent=2)


FORMATS: dict[str, Callable[[Sequence[CriticalBatch]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
}


def draw(found: Sequence[CriticalBatch], path: Path) -> None:
    """Critical batch and noise scales over tokens, beside the losses that it was read from.

    A row of axes for each source: at the left the batches of all its points, at the right what a
    batch costs at each.
    """
    sources = list(dict.fromkeys(each.source for each in found))
    with needs("results", "figures are drawn with matplotlib"):
        from matplotlib import pyplot, ticker
    with pyplot.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure, rows = pyplot.subplots(
            len(sources),
            2,
            figsize=(2.2 * width, 1.4 * height * len(sources)),
            squeeze=False,
            layout="constrained",
        )
        for source, (left, right) in zip(sources, rows, strict=True):
            points = [each for each in found if each.source == source]
            tokens = [each.tokens for each in points]
            for (field, name), marker in zip(DEFINITIONS.items(), "osD", strict=True):
                sizes = [getattr(each, field) or np.nan for each in points]
                left.plot(tokens, sizes, marker, color="black", label=f"critical batch: {name}")
            names = list(dict.fromkeys(name for each in points for name in each.noise_scales))
            geometries, estimates = (
                list(dict.fromkeys(name.split("/")[place] for name in names)) for place in (0, 1)
            )
            for name in names:  # a colour a geometry, dashes an estimate
                geometry, estimate = name.split("/")
                color = COLORS[geometries.index(geometry) % len(COLORS)]
                dashes = DASHES[estimates.index(estimate) % len(DASHES)]
                sizes = [each.noise_scales.get(name, np.nan) for each in points]
                label = f"{geometry} {estimate}"
                left.plot(tokens, sizes, linestyle=dashes, color=color, label=label)
            left.set(xlabel="tokens", ylabel="sequences", yscale="log", title=source)
            left.xaxis.set_major_formatter(lambda value, _: short_number(value))
            for number, each in enumerate(points):
                best = min(branch.loss for branch in each.branches)
                right.errorbar(
                    [branch.batch_size for branch in each.branches],
                    [branch.loss - best for branch in each.branches],
                    yerr=[branch.standard_error or 0.0 for branch in each.branches],
                    marker="o",
                    markersize=3,
                    capsize=2,
                    color=pyplot.get_cmap("viridis")(number / max(len(points) - 1, 1) * 0.85),
                    label=f"at {short_number(each.tokens)} tokens",
                )
            right.set(
                xlabel="batch size (sequences)",
                ylabel="loss above the best\n(nats per token)",
            )
            right.set_xscale("log", base=2)
            for axis in (right.xaxis, left.yaxis):
                axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            left.yaxis.set_minor_formatter(ticker.NullFormatter())
            left.yaxis.set_major_locator(ticker.LogLocator(base=2))
            for axes in (left, right):
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
                axes.legend(fontsize=7, ncols=2, **below)
        try:
            save(figure, path)
        finally:
            pyplot.close(figure)
