"""The tables of arXiv:2602.03001 as data: which run stands where, and the values printed there.

Tables 2, 8 and 9 have their values from version 1; Table 2's Euclidean column, Table 3 and the
sensitivity to theta from the revised version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Quantity = Literal["loss", "steps", "first_reaching", "share", "total_steps"]


@dataclass(frozen=True)
class Statistic:
    """One number of a table.

    Args:
        value: in the unit of its column; None where no run reaches the baseline.
        deviation: sample standard deviation over seeds; None with fewer than two, or where the
            column has none.
        seeds: that went into it.
        reached: of them, how many reach the baseline's lowest loss; None where that does not count.
    """

    value: float | None
    deviation: float | None = None
    seeds: tuple[int, ...] = ()
    reached: int | None = None


@dataclass(frozen=True)
class Label:
    """A header or row label; one with a key shows that setting of its runs.

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
class Entry:
    """A quantity of a cell's runs, or of them against a baseline's, and the paper's value of it."""

    quantity: Quantity
    cell: str
    baseline: str | None = None
    paper: Statistic | None = None


Column: TypeAlias = tuple[str, Label]  # group and title
Row: TypeAlias = tuple[tuple[Label, ...], tuple[Entry, ...]]  # labels, then an entry a column


@dataclass(frozen=True)
class TableLayout:
    """A table without its values.

    Args:
        name: as in the runs' setting `table`.
        title: one line.
        label_titles: headers of the label columns.
        columns: of the entries.
        rows: from top to bottom.
        paper_scale: the scale at which the paper's values are comparable.
        baseline: what the steps reduction compares with.
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
        return [entry for _, entries in self.rows for entry in entries]

    @property
    def cells(self) -> list[str]:
        """Every cell once, in reading order."""
        return list(dict.fromkeys(entry.cell for entry in self.entries))


INITIAL, THETA = "batch_size.initial", "batch_size.theta"
LOSS, REDUCTION = "validation loss", "steps reduction (%)"
OPTIMIZERS = {
    "signsgd": "signSGD",
    "signum": "Signum",
    "adamw": "AdamW",
    "specsgd": "specSGD",
    "muon": "Muon",
}
LossAndSpread = tuple[float, float | None]  # mean and standard deviation, where the paper has one


def _against_baseline(
    roles: Mapping[str, Label],
    rows: Mapping[str, tuple[str, float | None, tuple[LossAndSpread, ...]]],
) -> tuple[tuple[Column, ...], tuple[Row, ...]]:
    """A row for each optimizer: losses by role, then what the adaptive runs save.

    Args:
        roles: headers of the losses; a cell is <optimizer>_<role>.
        rows: by optimizer the baseline's role, the paper's steps reduction (one number; its
            definition and its curves do not agree on which of ours it is), and losses by role.
    """
    saved = [Label(text) for text in ("first reaching", "seeds reaching", "total steps")]
    columns = [
        *((LOSS, label) for label in roles.values()),
        *((REDUCTION, label) for label in saved),
    ]
    filled = []
    for optimizer, (base, reduction, losses) in rows.items():
        pair = f"{optimizer}_adaptive", f"{optimizer}_{base}"
        entries = [
            *(
                Entry("loss", f"{optimizer}_{role}", None, Statistic(*loss))
                for role, loss in zip(roles, losses, strict=True)
            ),
            Entry("first_reaching", *pair, Statistic(reduction)),
            Entry("share", *pair),
            Entry("total_steps", *pair, Statistic(reduction)),
        ]
        filled.append(((Label(OPTIMIZERS[optimizer]),), tuple(entries)))
    return tuple(columns), tuple(filled)


def _loss_and_steps(
    rows: Mapping[str, tuple[tuple[Label | str, ...], LossAndSpread, float]],
) -> tuple[tuple[Column, ...], tuple[Row, ...]]:
    """A row for each cell: its labels, its loss and its median steps."""
    filled = []
    for cell, (labels, loss, steps) in rows.items():
        texts = [Label(label) if isinstance(label, str) else label for label in labels]
        entries = (
            Entry("loss", cell, None, Statistic(*loss)),
            Entry("steps", cell, None, Statistic(steps)),
        )
        filled.append((tuple(texts), entries))
    return (("", Label(LOSS)), ("", Label("median steps"))), tuple(filled)


SMALL = Label("{}", INITIAL, "64", "small")
MIDDLE = Label("{}", INITIAL, "128", "middle")
LARGE = Label("{}", INITIAL, "256", "large")

# fmt: off
TABLE2 = TableLayout(
    "table2",
    "Table 2: constant and adaptive batches",
    ("optimizer",),
    *_against_baseline(
        {
            "small": Label("B = {}", INITIAL, "64", "small"),
            "large": Label("B = {}", INITIAL, "256", "large"),
            "euclidean": Label("Euclidean adaptive"),
            "adaptive": Label("adaptive"),
        },
        {
            "signsgd": ("large", 22.58,
                        ((4.1390, 0.0235), (3.9357, 0.0057), (3.8906, 0.0117), (3.8396, 0.0012))),
            "signum": ("small", 66.61,
                       ((3.3737, 0.0045), (3.4460, 0.0075), (3.3842, 0.0055), (3.3707, 0.0026))),
            "adamw": ("small", 67.13,
                      ((3.2991, 0.0054), (3.3228, 0.0101), (3.3127, 0.0101), (3.3031, 0.0054))),
            "specsgd": ("small", 16.49,
                        ((3.7489, 0.0096), (3.9404, 0.0074), (3.7436, 0.0274), (3.7285, 0.0094))),
            "muon": ("small", 66.77,
                     ((3.3041, 0.0021), (3.3411, 0.0019), (3.3181, 0.0072), (3.3061, 0.0027))),
        },
    ),
    baseline="baseline: the constant large batch for signSGD, the small one for the others; "
             "adaptive: by the noise scale of the optimizer's own geometry",
)
# fmt: on
TABLE3 = TableLayout(
    "table3",
    "Table 3: the larger model, constant and adaptive batches",
    ("optimizer",),
    *_against_baseline(
        {"baseline": Label("B = {}", INITIAL, "256", "baseline"), "adaptive": Label("adaptive")},
        {
            "signsgd": ("baseline", 31.84, ((3.1417, 0.0047), (2.9946, 0.0201))),
            "signum": ("baseline", 12.11, ((2.8306, 0.0051), (2.8354, 0.0073))),
            "adamw": ("baseline", None, ((2.7701, 0.0037), (2.8023, 0.0049))),
        },
    ),
    paper_scale="paper_1b",
    baseline="baseline: the constant batch of the same optimizer",
)
TABLE8 = TableLayout(
    "table8",
    "Table 8: signSGD, constant and adaptive batches",
    ("method", "initial batch", "lr scaling"),
    *_loss_and_steps(
        {
            "constant_small": (("constant", SMALL, ""), (4.1390, 0.0235), 24415),
            "constant_middle": (("constant", MIDDLE, ""), (3.9963, 0.0098), 8426),
            "constant_large": (("constant", LARGE, ""), (3.9357, 0.0057), 6103),
            "adaptive_small_unscaled": (("adaptive", SMALL, "off"), (3.6857, 0.0085), 9285),
            "adaptive_small_scaled": (("adaptive", SMALL, "on"), (3.6817, 0.0094), 9950),
            "adaptive_middle_unscaled": (("adaptive", MIDDLE, "off"), (3.7082, 0.0068), 7617),
            "adaptive_middle_scaled": (("adaptive", MIDDLE, "on"), (3.7029, 0.0094), 7826),
            "adaptive_large_unscaled": (("adaptive", LARGE, "off"), (3.8539, 0.0039), 5007),
            "adaptive_large_scaled": (("adaptive", LARGE, "on"), (3.8396, 0.0012), 5274),
        }
    ),
)
TABLE9 = TableLayout(
    "table9",
    "Table 9: signSGD, batches adapted by the Euclidean and by the Manhattan noise scale",
    ("noise scale", "initial batch"),
    *_loss_and_steps(
        {
            "euclidean_small": (("Euclidean", SMALL), (3.7431, 0.0402), 10798),
            "euclidean_middle": (("Euclidean", MIDDLE), (3.7752, 0.0088), 8869),
            "euclidean_large": (("Euclidean", LARGE), (3.8906, 0.0117), 5574),
            "manhattan_small": (("Manhattan", SMALL), (3.6817, 0.0094), 9950),
            "manhattan_middle": (("Manhattan", MIDDLE), (3.7029, 0.0094), 7826),
            "manhattan_large": (("Manhattan", LARGE), (3.8396, 0.0012), 5274),
        }
    ),
)
THETA_SENSITIVITY = TableLayout(
    "theta_sensitivity",
    "Sensitivity to theta: signSGD, batches adapted from the small one",
    ("theta",),
    *_loss_and_steps(
        {
            "theta_low": ((Label("{}", THETA, "0.5", "low"),), (3.6909, None), 7650),
            "theta_middle": ((Label("{}", THETA, "0.6", "middle"),), (3.6817, None), 9950),
            "theta_high": ((Label("{}", THETA, "0.7", "high"),), (3.7292, None), 12374),
        }
    ),
)
LAYOUTS = {layout.name: layout for layout in (TABLE2, TABLE3, TABLE8, TABLE9, THETA_SENSITIVITY)}
