"""Runs in figures as the paper's: perplexity, batch size, noise scale and learning rate.

Several seeds of a run become a mean and a band of one sample standard deviation, at each point over
the seeds that are there: the line goes on to the last one's end. Lines differ in color and in dash,
so that they can be told apart in grey print. matplotlib is imported where it draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.errors import InputError, needs, printable
from gns_pretrain.results.frame import NOISE_SCALE, Curve, pd
from gns_pretrain.system.files import must_write, write_whole
from gns_pretrain.tracking.console import short_number

AXIS_LABELS = {"step": "optimizer step", "tokens": "tokens", "samples": "images"}
# Distinct also to the colour-blind (Okabe and Ito), and in grey by their dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))
PARTNER_DASH = (0, (1, 1.5))  # of a published curve beside ours
STYLE = {
    "font.size": 9,
    "lines.linewidth": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}
PANEL_INCHES = (3.5, 2.7)
MOST_POINTS = 2000  # of a drawn line; more only make the file larger
LARGEST_RATIO = 200.0  # of the ends of a logarithmic axis
Curves = Mapping[str, Curve]  # of one run, by quantity, as read_curves gives them


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    label: str  # of the y-axis, with its unit
    quantity: str  # that it shows, in the variants <quantity>/... as well
    transform: Callable[[Curve], Curve] = np.positive  # after seeds were brought onto one grid
    log: bool = False  # scale of the y-axis
    stepwise: bool = False  # stays until it changes: nothing is sloped between points
    from_zero: bool = False  # the y-axis
    falls: bool = False  # steeply at first, so that the y-axis fits what comes after
    smooth: bool = False  # noisy from step to step, so that it is averaged
    behind: str | None = None  # a quantity drawn faintly behind it, as recorded
    names: tuple[str, str] = ("", "")  # of the line and of what is behind it

    def variants(self, runs: Iterable[Curves]) -> list[str]:
        """The quantities of these runs that it shows, in their order."""
        known = dict.fromkeys(name for run in runs for name in run)
        return [name for name in known if f"{name}/".startswith(f"{self.quantity}/")]


@dataclass(frozen=True)
class Size:
    """Of a figure, for the screen or for a place in print."""

    width: float | None  # inches; None is that of its panels
    panel: tuple[float, float]  # inches of one, where the width does not decide
    most_columns: int  # of panels
    font: float  # points
    line: float  # points


SIZES = {
    "screen": Size(None, PANEL_INCHES, 3, 9.0, 1.4),
    "column": Size(3.25, (3.25, 1.9), 1, 7.5, 1.1),  # of a page with two
    "page": Size(6.75, (3.375, 2.2), 3, 7.5, 1.1),
}
PANELS = {
    "perplexity": Panel("validation perplexity", "loss", transform=np.exp, log=True, falls=True),
    "loss": Panel("validation loss (nats)", "loss", falls=True),
    "accuracy": Panel("validation accuracy", "accuracy"),
    "losses": Panel(
        "loss (nats)",
        "loss",
        behind="train_loss",
        names=("validation", "training, each step"),
    ),
    "train_loss": Panel(
        "training loss (nats)",
        "train_loss",
        falls=True,
        smooth=True,
        behind="train_loss",
        names=("mean over {share} % of the run", "each step"),
    ),
    "batch_size": Panel("batch size (samples)", "batch_size", stepwise=True, from_zero=True),
    "noise_scale": Panel("noise scale (samples)", NOISE_SCALE),
    "lr": Panel("learning rate", "lr", log=True),
}


def _chosen_panels(
    groups: Mapping[str, Sequence[Curves]], panels: Sequence[str] | None
) -> Sequence[str]:
    known = [run for runs in groups.values() for run in runs]
    if panels is None:
        first = ("loss", "accuracy") if PANELS["accuracy"].variants(known) else ("perplexity",)
        paper = (*first, "batch_size", "noise_scale", "lr")
        names = [name for name in paper if PANELS[name].variants(known)]
        if not names:
            raise InputError("the runs hold nothing to draw; name finished or running runs")
        return names
    for name in panels:
        if name not in PANELS:
            raise InputError(f"there is no panel {name}; use some of {', '.join(PANELS)}")
        if not PANELS[name].variants(known):
            quantities = sorted({quantity for run in known for quantity in run})
            raise InputError(
                f"none of the runs has the panel {name}; they have {', '.join(quantities)}"
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
            ends = [run[name].index[-1] for run in runs for name in PANELS[panel].variants([run])]
            if len(set(ends)) > 1:
                parts = [
                    f"{sum(e >= end for e in ends)} to {short_number(end)}"
                    for end in sorted({*ends})
                ]
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
    smooth: float = 0.02,
    size: str = "screen",
    partners: Mapping[str, str] | None = None,
) -> list[str]:
    """Draw groups of runs and save the figure.

    Args:
        groups: by the label that the legend shows, the runs of its seeds.
        paths: to write; each ending decides: .png, .pdf, ...
        panels: names of PANELS; None takes the paper's, as far as the runs have them.
        axis: step, tokens or samples, as the curves were read.
        each_seed: a thin line for every seed, instead of mean and band; a mean has a tick where a
            seed ends before the others.
        title: over all panels.
        focus: the y-axis of a loss fits what comes after this share of each run.
        smooth: the training loss is averaged over this share of each run, with each step's faintly
            behind it; 0 shows each step's alone.
        size: a name of SIZES.
        partners: by label, that of the group whose color it has, dotted.

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

    chosen = SIZES[size]
    columns = 2 if len(names) == 4 else len(names)
    columns = min(columns, chosen.most_columns)
    rows = -(-len(names) // columns)
    width = chosen.width or chosen.panel[0] * columns
    height = chosen.panel[1] * rows * max(0.85, width / columns / chosen.panel[0]) + 0.4
    style = STYLE | {"font.size": chosen.font, "lines.linewidth": chosen.line}
    drawing = _Drawing(groups, _looks(groups, partners or {}), each_seed, focus, smooth)
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
        for name, axes in zip(names, grid.flat, strict=False):
            panel = PANELS[name]
            fitted = drawing.draw(axes, panel)
            _format_axes(axes, panel, axis, fitted if panel.falls and focus > 0 else [])
        drawn = grid.flat[: len(names)]
        widest = max(axes.get_xlim()[1] for axes in drawn)
        for axes in drawn:
            axes.set_xlim(-0.03 * widest, widest)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title)
        _legend_below(figure, drawing.legend())
        try:
            for path in paths:
                save(figure, path)
        finally:
            pyplot.close(figure)
    return names


def _looks(
    groups: Mapping[str, Sequence[Curves]], partners: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Color and dash of each group's lines."""
    looks: dict[str, dict[str, Any]] = {}
    for label in groups:
        number = len(looks) - len(partners.keys() & looks)
        looks[label] = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
    for label, partner in partners.items():
        looks[label] = looks[partner] | {"linestyle": PARTNER_DASH}
    return looks


@dataclass
class _Drawing:
    """Lines of groups of runs, as `draw` describes them."""

    groups: Mapping[str, Sequence[Curves]]
    looks: Mapping[str, dict[str, Any]]
    each_seed: bool
    focus: float
    smooth: float

    def draw(self, axes: Any, panel: Panel) -> list[Curve]:
        """Draw a panel's lines; return what the y-axis of a loss has to fit."""
        variants = panel.variants(run for runs in self.groups.values() for run in runs)
        fitted: list[Curve] = []
        for label, runs in self.groups.items():
            if panel.behind and (self.smooth or not panel.smooth):
                for curve in (run[panel.behind] for run in runs if panel.behind in run):
                    faint = self.looks[label] | {"alpha": 0.25, "lw": 0.6, "linestyle": "-"}
                    axes.plot(thinned(curve), **faint)
            for variant in variants:
                curves = [run[variant] for run in runs if variant in run]
                if panel.smooth and self.smooth:
                    curves = [_averaged(curve, self.smooth) for curve in curves]
                look = self.looks[label] | self._look_of_variant(variant, variants)
                fitted += self._draw_lines(axes, panel, curves, look)
        self._name_lines(axes, panel, variants)
        return fitted

    def _look_of_variant(self, variant: str, variants: Sequence[str]) -> dict[str, Any]:
        """Several noise scales differ in dash; those of one group in color, too."""
        if len(variants) < 2:
            return {}
        number = variants.index(variant)
        look: dict[str, Any] = {"linestyle": DASHES[number % len(DASHES)]}
        return look | ({"color": COLORS[number % len(COLORS)]} if len(self.groups) == 1 else {})

    def _draw_lines(
        self, axes: Any, panel: Panel, curves: Sequence[Curve], look: dict[str, Any]
    ) -> list[Curve]:
        """Draw a mean with its band, or each line."""
        if self.each_seed and len(curves) > 1:
            look = look | {"lw": 0.9}
        fitted = []
        for part in [[curve] for curve in curves] if self.each_seed else filter(None, [curves]):
            band = over_seeds(part, transform=panel.transform, stepwise=panel.stepwise)
            first, last = band.index[[0, -1]]
            fitted.append(band["mean"].loc[first + self.focus * (last - first) :])
            shape: dict[str, Any] = {"drawstyle": "steps-post"} if panel.stepwise else {}
            if len(band) == 1:  # no line
                shape |= {"marker": "o", "markersize": 3}
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

    def _name_lines(self, axes: Any, panel: Panel, variants: Sequence[str]) -> None:
        """Name what the legend of the figure does not: kinds of lines within the panel."""
        from matplotlib.lines import Line2D

        grey = {"color": "0.35"}
        named: list[tuple[str, dict[str, Any]]] = []
        if panel.behind and (self.smooth or not panel.smooth):
            line, faint = (name.format(share=f"{100 * self.smooth:.2g}") for name in panel.names)
            named = [(line, grey), (faint, grey | {"alpha": 0.4, "lw": 0.6})]
        elif len(variants) > 1:
            named = [
                (noise_text(variant), grey | self._look_of_variant(variant, variants))
                for variant in variants
            ]
        if panel.quantity == NOISE_SCALE:
            whose = noise_text(variants[0]) if len(variants) == 1 else ""
            axes.set_title(f"{whose}: running average".removeprefix(": "), fontsize="medium")
        if named:
            handles = [Line2D([], [], label=label, **look) for label, look in named]
            frame = {"frameon": True, "edgecolor": "none", "framealpha": 0.7}  # over lines
            axes.legend(handles=handles, loc="best", fontsize="small", **frame)

    def legend(self) -> list[Any]:
        """A line for each group, with the number of its seeds, and what band and tick mean."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        handles: list[Any] = []
        for label, runs in self.groups.items():
            # A name is no formula.
            text = printable(label).replace("$", r"\$")
            seeds = f" (n = {len(runs)})" if len(runs) > 1 else ""
            handles.append(Line2D([], [], label=text + seeds, **self.looks[label]))
        if not self.each_seed and any(len(runs) > 1 for runs in self.groups.values()):
            band = "mean ± std over n seeds"
            handles.append(Patch(color="0.35", alpha=0.25, linewidth=0, label=band))
        return handles


def _averaged(curve: Curve, share: float) -> Curve:
    """The mean of the points around each, over a share of all."""
    return curve.rolling(max(1, round(share * len(curve))), center=True, min_periods=1).mean()


def noise_text(variant: str) -> str:
    """Manhattan, plug-in: of noise_scale/manhattan/plug_in."""
    _, _, whose = variant.partition("/")
    return printable(whose.replace("/", ", ").replace("_", "-")).capitalize().replace("$", r"\$")


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
    narrow = axes.get_window_extent().width / axes.figure.dpi < 2.2  # inches
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if narrow else 6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: short_number(value, exact=True))
    )
    if not panel.log:
        # Nothing that is shown can be negative.
        axes.set_ylim(bottom=0.0 if panel.from_zero else max(0.0, axes.get_ylim()[0]))
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low = max(low, high / LARGEST_RATIO)  # a learning rate ends at 0
    axes.set_ylim(low, high)
    # Within one decade its powers alone would leave the axis without a number.
    subs: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
    if high / low > 8:
        subs = (1.0, 2.0, 3.0, 5.0)
    if high / low > 80:
        subs = (1.0,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    plain = ticker.FuncFormatter(lambda value, _: f"{value:,g}")
    powers = ticker.LogFormatterMathtext(labelOnlyBase=False)
    axes.yaxis.set_major_formatter(plain if low >= 0.01 else powers)
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
