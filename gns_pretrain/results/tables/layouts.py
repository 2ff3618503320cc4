"""Where each run stands in the tables of arXiv:2602.03001, and the values printed there.

Tables 2, 8 and 9 have them from version 1; Table 2's Euclidean column, Table 3 and the sensitivity
to theta from the revised version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Literal

# The arithmetic of the tables (arXiv:2602.03001, Tables 2, 3, 8 and 9). Pure functions.
#
# A loss is in nats per token. Steps are optimizer steps. Runs that are compared have the same seed.


@dataclass(frozen=True)
class LossCurve:
    """Evaluations of a run.

    Args:
        steps: after which it was evaluated, ascending; at least one.
        losses: validation losses there.
        total_steps: of the whole run.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    total_steps: int

    @property
    def minimum(self) -> float:
        """The lowest validation loss."""
        return min(self.losses)

    @property
    def minimum_step(self) -> int:
        """The first step that has it."""
        return self.steps[self.losses.index(self.minimum)]

    def first_reaching(self, loss: float) -> int | None:
        """The first evaluation with this loss or less; None if there is none."""
        reached = (
            step for step, value in zip(self.steps, self.losses, strict=True) if value <= loss
        )
        return next(reached, None)


Seeds = Mapping[int, LossCurve]  # runs of one cell, by seed


@dataclass(frozen=True)
class Statistic:
    """One number of a table.

    Args:
        value: in the unit of its column; None where no run reaches the baseline.
        deviation: sample standard deviation over seeds; None with fewer than two, or where the
            column has none.
        seeds: that went into it.
        reached: of them, how many reach the baseline's minimum; None where nothing asks.
    """

    value: float | None
    deviation: float | None = None
    seeds: tuple[int, ...] = ()
    reached: int | None = None


def minimum_loss(runs: Seeds) -> Statistic:
    """Mean and sample standard deviation of the lowest validation loss."""
    lowest = [run.minimum for run in runs.values()]
    return Statistic(
        fmean(lowest), stdev(lowest) if len(lowest) > 1 else None, seeds=tuple(sorted(runs))
    )


def median_steps(runs: Seeds) -> Statistic:
    """Median of the steps that the token budget takes."""
    return Statistic(
        float(median(run.total_steps for run in runs.values())), seeds=tuple(sorted(runs))
    )


def reduction_by_first_reaching(adaptive: Seeds, baseline: Seeds) -> Statistic:
    """Median of 100 (1 - a / b), in percent, over the seeds that reach.

    a is the step at which the adaptive run first has the baseline's lowest loss, b the step at
    which the baseline has it.
    """
    pairs = paired(adaptive, baseline)
    reductions = [
        100 * (1 - step / constant.minimum_step)
        for run, constant in pairs.values()
        if (step := run.first_reaching(constant.minimum)) is not None
    ]
    return Statistic(_median(reductions), seeds=tuple(pairs), reached=len(reductions))


def reduction_by_total_steps(adaptive: Seeds, baseline: Seeds) -> Statistic:
    """Median of 100 (1 - a / b), in percent; a and b are all steps of either run."""
    pairs = paired(adaptive, baseline)
    reductions = [
        100 * (1 - run.total_steps / constant.total_steps) for run, constant in pairs.values()
    ]
    return Statistic(_median(reductions), seeds=tuple(pairs))


def paired(adaptive: Seeds, baseline: Seeds) -> dict[int, tuple[LossCurve, LossCurve]]:
    """Runs of the same seed, by seed."""
    return {seed: (adaptive[seed], baseline[seed]) for seed in sorted(adaptive.keys() & baseline)}


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


# What a table is before it has values: columns, rows, and the statistic at each place.

Kind = Literal["loss", "steps", "first_reaching", "share", "total_steps"]


@dataclass(frozen=True)
class Text:
    """A header or label; one with a key shows that setting of its runs.

    Args:
        text: shown as it is; with a key, `{}` stands for the setting.
        key: dotted name of a setting.
        paper: the paper's value of it, for published curves.
        role: what stands there without any run.
    """

    text: str
    key: str | None = None
    paper: str = ""
    role: str = ""


@dataclass(frozen=True)
class Column:
    """A column; several may share a group."""

    group: str
    title: Text


@dataclass(frozen=True)
class Entry:
    """What stands at one place: a statistic of a cell's runs, or of them against a baseline's."""

    kind: Kind
    cell: str
    baseline: str | None = None
    paper: Statistic | None = None


@dataclass(frozen=True)
class Row:
    """A row: labels, then an entry a column."""

    labels: tuple[Text, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Layout:
    """A table without its values.

    Args:
        name: as in the runs' setting `table`.
        title: one line.
        label_titles: headers of the label columns.
        columns: headers of the entries.
        rows: from top to bottom.
        paper_scale: the scale at which the paper's values are comparable.
        baseline: what the steps reduction compares with, for people.
    """

    name: str
    title: str
    label_titles: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    paper_scale: str = "paper"
    baseline: str = ""

    @property
    def entries(self) -> list[Entry]:
        """All of them, row by row."""
        return [entry for row in self.rows for entry in row.entries]

    @property
    def cells(self) -> list[str]:
        """Every cell once, in reading order."""
        return list(dict.fromkeys(entry.cell for entry in self.entries))


INITIAL, THETA = "batch_size.initial", "batch_size.theta"
LOSS, REDUCTION = "validation loss", "steps reduction (%)"

Values = tuple[float, float]  # the paper's mean and standard deviation
OPTIMIZERS = {
    "signsgd": "signSGD",
    "signum": "Signum",
    "adamw": "AdamW",
    "specsgd": "specSGD",
    "muon": "Muon",
}
REDUCTION_COLUMNS = (
    Column(REDUCTION, Text("first reaching")),
    Column(REDUCTION, Text("seeds reaching")),
    Column(REDUCTION, Text("total steps")),
)


def _loss(cell: str, paper: Values) -> Entry:
    return Entry("loss", cell, paper=Statistic(*paper))


def _reductions(adaptive: str, baseline: str, paper: float | None) -> tuple[Entry, ...]:
    """The paper prints one number, and its definition and its curves do not agree on which."""
    value = Statistic(paper)
    return (
        Entry("first_reaching", adaptive, baseline, value),
        Entry("share", adaptive, baseline),
        Entry("total_steps", adaptive, baseline, value),
    )


def _loss_and_steps(cell: str, loss: Values, steps: float) -> tuple[Entry, ...]:
    return (_loss(cell, loss), Entry("steps", cell, paper=Statistic(steps)))


def _table2() -> Layout:
    paper: dict[str, tuple[Values, Values, Values, Values, float]] = {
        "signsgd": ((4.1390, 0.0235), (3.9357, 0.0057), (3.8906, 0.0117), (3.8396, 0.0012), 22.58),
        "signum": ((3.3737, 0.0045), (3.4460, 0.0075), (3.3842, 0.0055), (3.3707, 0.0026), 66.61),
        "adamw": ((3.2991, 0.0054), (3.3228, 0.0101), (3.3127, 0.0101), (3.3031, 0.0054), 67.13),
        "specsgd": ((3.7489, 0.0096), (3.9404, 0.0074), (3.7436, 0.0274), (3.7285, 0.0094), 16.49),
        "muon": ((3.3041, 0.0021), (3.3411, 0.0019), (3.3181, 0.0072), (3.3061, 0.0027), 66.77),
    }
    rows = []
    for name, (small, large, euclidean, adaptive, reduction) in paper.items():
        baseline = f"{name}_large" if name == "signsgd" else f"{name}_small"
        losses = (
            _loss(f"{name}_small", small),
            _loss(f"{name}_large", large),
            _loss(f"{name}_euclidean", euclidean),
            _loss(f"{name}_adaptive", adaptive),
        )
        entries = losses + _reductions(f"{name}_adaptive", baseline, reduction)
        rows.append(Row((Text(OPTIMIZERS[name]),), entries))
    columns = (
        Column(LOSS, Text("B = {}", INITIAL, "64", "small")),
        Column(LOSS, Text("B = {}", INITIAL, "256", "large")),
        Column(LOSS, Text("Euclidean adaptive")),
        Column(LOSS, Text("adaptive")),
        *REDUCTION_COLUMNS,
    )
    title = "Table 2: constant and adaptive batches"
    baseline = (
        "baseline: the constant large batch for signSGD, the small one for the others; adaptive: "
        "by the noise scale of the optimizer's own geometry"
    )
    return Layout("table2", title, ("optimizer",), columns, tuple(rows), baseline=baseline)


def _table3() -> Layout:
    paper: dict[str, tuple[Values, Values, float | None]] = {
        "signsgd": ((3.1417, 0.0047), (2.9946, 0.0201), 31.84),
        "signum": ((2.8306, 0.0051), (2.8354, 0.0073), 12.11),
        "adamw": ((2.7701, 0.0037), (2.8023, 0.0049), None),
    }
    rows = tuple(
        Row(
            (Text(OPTIMIZERS[name]),),
            (
                _loss(f"{name}_baseline", baseline),
                _loss(f"{name}_adaptive", adaptive),
                *_reductions(f"{name}_adaptive", f"{name}_baseline", reduction),
            ),
        )
        for name, (baseline, adaptive, reduction) in paper.items()
    )
    columns = (
        Column(LOSS, Text("B = {}", INITIAL, "256", "baseline")),
        Column(LOSS, Text("adaptive")),
        *REDUCTION_COLUMNS,
    )
    title = "Table 3: the larger model, constant and adaptive batches"
    baseline = "baseline: the constant batch of the same optimizer"
    return Layout("table3", title, ("optimizer",), columns, rows, "paper_1b", baseline)


SIZES = {"small": "64", "middle": "128", "large": "256"}
LOSS_AND_STEPS = (Column("", Text(LOSS)), Column("", Text("median steps")))


def _initial(size: str) -> Text:
    return Text("{}", INITIAL, SIZES[size], size)


def _table8() -> Layout:
    paper: dict[str, tuple[Values, float]] = {
        "constant_small": ((4.1390, 0.0235), 24415),
        "constant_middle": ((3.9963, 0.0098), 8426),
        "constant_large": ((3.9357, 0.0057), 6103),
        "adaptive_small_unscaled": ((3.6857, 0.0085), 9285),
        "adaptive_small_scaled": ((3.6817, 0.0094), 9950),
        "adaptive_middle_unscaled": ((3.7082, 0.0068), 7617),
        "adaptive_middle_scaled": ((3.7029, 0.0094), 7826),
        "adaptive_large_unscaled": ((3.8539, 0.0039), 5007),
        "adaptive_large_scaled": ((3.8396, 0.0012), 5274),
    }
    scaling = {"unscaled": "off", "scaled": "on"}
    rows = []
    for cell, (loss, steps) in paper.items():
        method, size, *scaled = cell.split("_")
        labels = (Text(method), _initial(size), Text(scaling[scaled[0]] if scaled else ""))
        rows.append(Row(labels, _loss_and_steps(cell, loss, steps)))
    title = "Table 8: signSGD, constant and adaptive batches"
    labels_of = ("method", "initial batch", "lr scaling")
    return Layout("table8", title, labels_of, LOSS_AND_STEPS, tuple(rows))


def _table9() -> Layout:
    paper: dict[str, tuple[Values, float]] = {
        "euclidean_small": ((3.7431, 0.0402), 10798),
        "euclidean_middle": ((3.7752, 0.0088), 8869),
        "euclidean_large": ((3.8906, 0.0117), 5574),
        "manhattan_small": ((3.6817, 0.0094), 9950),
        "manhattan_middle": ((3.7029, 0.0094), 7826),
        "manhattan_large": ((3.8396, 0.0012), 5274),
    }
    rows = []
    for cell, (loss, steps) in paper.items():
        geometry, size = cell.split("_")
        labels = (Text(geometry.capitalize()), _initial(size))
        rows.append(Row(labels, _loss_and_steps(cell, loss, steps)))
    title = "Table 9: signSGD, batches adapted by the Euclidean and by the Manhattan noise scale"
    return Layout("table9", title, ("noise scale", "initial batch"), LOSS_AND_STEPS, tuple(rows))


def _theta_sensitivity() -> Layout:
    paper: dict[str, tuple[str, float, float]] = {
        "theta_low": ("0.5", 3.6909, 7650),
        "theta_middle": ("0.6", 3.6817, 9950),
        "theta_high": ("0.7", 3.7292, 12374),
    }
    rows = tuple(
        Row(
            (Text("{}", THETA, theta, cell.removeprefix("theta_")),),
            (
                Entry("loss", cell, paper=Statistic(loss)),
                Entry("steps", cell, paper=Statistic(steps)),
            ),
        )
        for cell, (theta, loss, steps) in paper.items()
    )
    title = "Sensitivity to theta: signSGD, batches adapted from the small one"
    return Layout("theta_sensitivity", title, ("theta",), LOSS_AND_STEPS, rows)


LAYOUTS = {
    layout.name: layout
    for layout in (_table2(), _table3(), _table8(), _table9(), _theta_sensitivity())
}
