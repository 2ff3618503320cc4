"""Runs in figures as the paper's: perplexity, batch size, noise scale and learning rate.

Several seeds of a run become a mean and a band of one sample standard deviation, at each point over
the seeds that are there: the line goes on to the last one's end. matplotlib is imported where it
draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.errors import InputError, needs, printable
from gns_pretrain.results.frame import Curve, pd
from gns_pretrain.system.files import must_write, write_whole
from gns_pretrain.tracking.console import short_number

AXIS_LABELS = {"step": "optimizer step", "tokens": "tokens"}
# Distinct also to the colour-blind (Okabe and Ito); then again with dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text
}
MOST_MARKERS = 25  # a line of fewer points shows them
PANEL_INCHES = (3.5, 2.7)
MOST_POINTS = 2000  # of a drawn line; more only make the file larger
Curves = Mapping[str, Curve]  # of one run, by quantity, as read_curves gives them


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    label: str  # of the y-axis, with its unit
    quantity: str  # that it shows
    transform: Callable[[Curve], Curve] = np.positive  # after seeds were brought onto one grid
    log: bool = False  # scale of the y-axis
    stepwise: bool = False  # stays until it changes: nothing is sloped between points
    falls: bool = False  # steeply at first, so that the y-axis fits what comes after
    behind: str | None = None  # a quantity drawn faintly behind it


PANELS = {
    "perplexity": Panel("validation perplexity", "loss", transform=np.exp, log=True, falls=True),
    "loss": Panel("validation loss (nats per token)", "loss", falls=True),
    "losses": Panel("loss (nats per token)", "loss", behind="train_loss"),
    "train_loss": Panel("training loss (nats per token)", "train_loss", falls=True),
    "batch_size": Panel("batch size (sequences)", "batch_size", stepwise=True),
    "noise_scale": Panel("noise scale, average (sequences)", "noise_scale"),
    "lr": Panel("learning rate", "lr"),
}


def _chosen_panels(
    groups: Mapping[str, Sequence[Curves]], panels: Sequence[str] | None
) -> Sequence[str]:
    known = {quantity for runs in groups.values() for run in runs for quantity in run}
    if panels is None:
        paper = ("perplexity", "batch_size", "noise_scale", "lr")
        names = [name for name in paper if PANELS[name].quantity in known]
        if not names:
            raise InputError("the runs hold nothing to draw; name finished or running runs")
        return names
    for name in panels:
        if name not in PANELS:
            raise InputError(f"there is no panel {name}; use some of {', '.join(PANELS)}")
        if PANELS[name].quantity not in known:
            raise InputError(
                f"none of the runs has the panel {name}; they have {', '.join(sorted(known))}"
            )
    return panels


def over_seeds(
    curves: Sequence[Curve],
    *,
    transform: Callable[[Curve], Curve] = np.positive,
    stepwise: bool = False,
) -> pd.DataFrame:
    """Mean, sample standard deviation (`std`) and number (`count`) of the seeds' curves.

    Runs whose batch adapts were evaluated at different steps, and end at different ones: each is
    interpolated onto all their points between its own first and last, and counts there alone. So
    the mean may jump where a seed begins or ends, and one seed alone has no deviation (NaN). A
    single curve has a mean only, at its own points.

    Args:
        curves: one for each seed.
        transform: of the interpolated values; a perplexity is interpolated as a loss.
        stepwise: interpolate by the value before, as a batch size.
    """
    if len(curves) == 1:
        return transform(curves[0]).to_frame("mean")
    seeds = pd.concat(curves, axis=1).sort_index()
    if stepwise:
        seeds = seeds.ffill().where(seeds.bfill().notna())
    else:
        seeds = seeds.interpolate(method="index", limit_area="inside")
    return transform(seeds).agg(["mean", "std", "count"], axis=1)


def notes_on_ends(
    groups: Mapping[str, Sequence[Curves]], panels: Sequence[str], axis: str
) -> list[str]:
    """Name each group whose seeds end at different points, with how many are averaged to where."""
    notes = []
    for label, runs in groups.items():
        for panel in panels:
            quantity = PANELS[panel].quantity
            ends = [run[quantity].index[-1] for run in runs if quantity in run]
            if len(set(ends)) > 1:
                parts = [f"{sum(e >= end for e in ends)} to {end:,.0f}" for end in sorted({*ends})]
                notes.append(f"{label} is a mean over {', '.join(parts)} ({AXIS_LABELS[axis]})")
                break
    return notes


def thinned(curves: Any) -> Any:
    """At most MOST_POINTS of a curve's or frame's points, evenly, first and last among them."""
    if len(curves) <= MOST_POINTS:
        return curves
    return curves.iloc[np.linspace(0, len(curves) - 1, MOST_POINTS).round().astype(int)]


def draw(
    groups: Mapping[str, Sequence[Curves]],
    paths: Sequence[Path],
    *,
    panels: Sequence[str] | None = None,
    axis: str = "step",
    each_seed: bool = False,
    title: str | None = None,
    focus: float = 0.15,
) -> list[str]:
    """Draw groups of runs and save the figure.

    Args:
        groups: by the label that the legend shows, the runs of its seeds.
        paths: to write; each ending decides: .png, .pdf, ...
        panels: names of PANELS; None takes the paper's, as far as the runs have them.
        axis: step or tokens, as the curves were read.
        each_seed: a thin line for every seed, instead of mean and band; a mean has a tick where a
            seed ends before the others.
        title: over all panels.
        focus: the y-axis of a loss fits what comes after this share of each run.

    Returns:
        The panels that were drawn.

    Raises:
        InputError: a panel that no run can fill, or a file that cannot be written.
    """
    names = list(_chosen_panels(groups, panels))
    with needs("figures", "figures are drawn with matplotlib"):
        import matplotlib
    matplotlib.use("Agg")  # to files alone
    from matplotlib import pyplot

    columns = 2 if len(names) == 4 else min(len(names), 3)
    rows = -(-len(names) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4)
    looks = {
        label: {
            "label": printable(label).replace("$", r"\$"),  # a name is no formula
            "color": COLORS[number % len(COLORS)],
            "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
        }
        for number, label in enumerate(groups)
    }
    with pyplot.rc_context(STYLE):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for name, axes in zip(names, grid.flat, strict=False):
            panel = PANELS[name]
            fitted: list[Curve] = []
            for label, runs in groups.items():
                fitted += _draw_runs(axes, panel, runs, looks[label], each_seed, focus)
            _format_axes(axes, panel, axis, fitted if panel.falls and focus > 0 else [])
        drawn = grid.flat[: len(names)]
        widest = max(axes.get_xlim()[1] for axes in drawn)
        for axes in drawn:
            axes.set_xlim(-0.03 * widest, widest)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title)
        _legend_below(figure, [pyplot.Line2D([], [], **look) for look in looks.values()])
        try:
            for path in paths:
                save(figure, path)
        finally:
            pyplot.close(figure)
    return names


def save(figure: Any, path: Path) -> None:
    """Write a file whole or not at all: half a picture would replace a good one."""
    hint = "use .png or .pdf in a folder that exists"
    if not path.suffix:  # as matplotlib does
        path = path.with_name(f"{path.name}.png")
    options = {"format": path.suffix[1:].lower(), "dpi": 200}
    with must_write(path, hint=hint):
        try:
            write_whole(path, lambda file: figure.savefig(file, **options))
        except ValueError as error:
            raise InputError(f"{path} cannot be written ({error}); {hint}") from error


def _legend_below(figure: Any, handles: Sequence[Any]) -> None:
    """A legend in as many columns as fit; in one, and smaller, where a name is longer than that."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        figure.draw_without_rendering()
        share = legend.get_window_extent().width / figure.bbox.width
        if share <= 1.0:
            return
        if columns > 1:
            legend.remove()
    for text in legend.get_texts():
        text.set_fontsize(text.get_fontsize() / share * 0.95)


def _draw_runs(
    axes: Any,
    panel: Panel,
    runs: Sequence[Curves],
    look: dict[str, Any],
    each_seed: bool,
    focus: float,
) -> list[Curve]:
    """Draw a group's runs; return what the y-axis of a loss has to fit."""
    if panel.behind:
        for curve in (run[panel.behind] for run in runs if panel.behind in run):
            axes.plot(thinned(curve), **(look | {"alpha": 0.25, "lw": 0.8}))
    curves = [run[panel.quantity] for run in runs if panel.quantity in run]
    if each_seed and len(curves) > 1:
        look = look | {"lw": 0.9}
    fitted = []
    for part in [[curve] for curve in curves] if each_seed else filter(None, [curves]):
        band = over_seeds(part, transform=panel.transform, stepwise=panel.stepwise)
        first, last = band.index[[0, -1]]
        fitted.append(band["mean"].loc[first + focus * (last - first) :])
        shape: dict[str, Any] = {}
        if panel.stepwise:
            shape = {"drawstyle": "steps-post"}
        elif len(band) <= MOST_MARKERS:
            shape = {"marker": "o", "markersize": 3}
        if "count" in band:
            ends = band["mean"][band["count"].diff(-1) > 0]
            if len(ends):
                axes.plot(ends, color=look["color"], linestyle="", marker="|", markersize=9)
        band = thinned(band)
        axes.plot(band["mean"], **look, **shape)
        if "std" in band:
            low, high = band["mean"] - band["std"], band["mean"] + band["std"]
            fitted.append(low.dropna().iloc[-1:])
            step = "post" if panel.stepwise else None
            filled = {"color": look["color"], "alpha": 0.2, "linewidth": 0, "step": step}
            axes.fill_between(band.index, low, high, **filled)
    return fitted


def _format_axes(axes: Any, panel: Panel, axis: str, fitted: Sequence[Curve]) -> None:
    from matplotlib import ticker

    if fitted:  # with a little room
        values = pd.concat(fitted)
        low, high = float(values.min()), float(values.max())
        room = (high / low) ** 0.05 if panel.log else 0.05 * (high - low)
        low, high = (low / room, high * room) if panel.log else (low - room, high + room)
        if low < high:
            axes.set_ylim(low, high)
    axes.set(xlabel=AXIS_LABELS[axis], ylabel=panel.label)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: short_number(value, exact=True))
    )
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Within one decade its powers alone would leave the axis without a number.
        subs = (1.0, 2.0, 3.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        return
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # nothing that is shown can be negative
    if panel.quantity == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
