"""The tables of arXiv:2602.03001 as data: which run stands where, and the values printed there.

Tables 2, 8 and 9 have their values from version 1; Table 2's Euclidean column, Table 3 and the
sensitivity to theta from the revised version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from gns_pretrain.tracking.unit import IMAGES, TOKENS, Unit

Quantity = Literal[
    "loss",
    "accuracy",
    "steps",
    "first_reaching",
    "share",
    "total_steps",
    "hours",
    "hours_to_best",
]
Score = Literal["loss", "accuracy"]  # by which runs are compared; one of their evaluations' curves


@dataclass(frozen=True)
class Statistic:
    """One number of a table, in the unit of its column."""

    value: float | None  # None where no run reaches the baseline
    deviation: float | None = None  # sample standard deviation over seeds, where there is one
    seeds: tuple[int, ...] = ()  # that went into it
    reached: int | None = None  # of them, those that reach the baseline's lowest loss


@dataclass(frozen=True)
class SettingLabel:
    """A header or row label that shows a setting of its runs."""

    text: str  # `{}` stands for the setting
    key: str  # its dotted name
    paper: str  # the paper's value of it, for published curves
    role: str  # what stands there without any run


@dataclass(frozen=True)
class Entry:
    """A quantity of a cell's runs, or of them against a baseline's, and the paper's value of it."""

    quantity: Quantity
    cell: str
    baseline: str | None = None
    paper: Statistic | None = None


Label: TypeAlias = SettingLabel | str
Column: TypeAlias = tuple[str, Label]  # group and title
Row: TypeAlias = tuple[Sequence[Label], Sequence[Entry]]  # labels, then an entry a column


@dataclass(frozen=True)
class TableLayout:
    """A table without its values."""

    name: str  # as in the runs' setting `table`
    title: str
    label_titles: tuple[str, ...]  # headers of the label columns
    columns: Sequence[Column]  # of the entries
    rows: Sequence[Row]
    paper_scale: str = "paper"  # the scale at which the paper's values are comparable
    baseline: str = ""  # what the steps reduction compares with
    score: Score = "loss"
    unit: Unit = TOKENS  # what its runs count

    @property
    def entries(self) -> list[Entry]:
        return [entry for _, entries in self.rows for entry in entries]

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(entry.cell for entry in self.entries))


INITIAL, THETA = "batch_size.initial", "batch_size.theta"
SCORES: dict[Score, str] = {"loss": "validation loss", "accuracy": "validation accuracy (%)"}
LOSS, REDUCTION = SCORES["loss"], "steps reduction (%)"
# Mean and standard deviation of a loss, or an accuracy in percent, where the paper has one.
MeanAndSpread = tuple[float | None, float | None]
NOT_PRINTED: MeanAndSpread = (None, None)


def _against_baseline(
    roles: Mapping[str, Label],
    rows: Mapping[str, tuple[str, float | None, tuple[MeanAndSpread, ...]]],
    score: Score = "loss",
    starts: Mapping[str, Label] | None = None,
) -> tuple[list[Column], list[Row]]:
    """A row for each optimizer: scores by role, then what the adaptive runs save.

    Args:
        roles: headers of the scores; a cell is <optimizer in lower case>_<role>.
        rows: by optimizer the baseline's role, the paper's steps reduction (one number; its
            definition and its curves do not agree on which of ours it is), and scores by role.
        score: what runs are compared by.
        starts: labels of the batches that adaptive runs begin with, a row for each, by what ends
            the cell's name; None is one row, without a label.
    """
    saved: dict[Quantity, str] = {
        "first_reaching": "first reaching",
        "share": "seeds reaching",
        "total_steps": "total steps",
    }
    columns = [(SCORES[score], label) for label in roles.values()]
    columns += [(REDUCTION, text) for text in saved.values()]
    begins: Mapping[str, Label | None] = {**starts} if starts else {"": None}
    filled: list[Row] = []
    for name, (base, reduction, printed) in rows.items():
        for ending, start in begins.items():
            cells = {role: f"{name.lower()}_{role}" for role in roles}
            cells["adaptive"] += ending
            entries = [
                Entry(score, cell, None, Statistic(*each))
                for cell, each in zip(cells.values(), printed, strict=True)
            ]
            for quantity in saved:
                paper = None if quantity == "share" else Statistic(reduction)
                entries.append(Entry(quantity, cells["adaptive"], cells[base], paper))
            filled.append(((name, start) if start else (name,), entries))
    return columns, filled


def _loss_and_steps(
    rows: Mapping[str, tuple[tuple[Label, ...], MeanAndSpread, float]],
) -> tuple[list[Column], list[Row]]:
    """A row for each cell: its labels, its loss and its median steps."""
    filled: list[Row] = []
    for cell, (labels, loss, steps) in rows.items():
        lowest = Entry("loss", cell, None, Statistic(*loss))
        filled.append((labels, [lowest, Entry("steps", cell, None, Statistic(steps))]))
    return [("", LOSS), ("", "median steps")], filled


def with_hours(layout: TableLayout) -> TableLayout:
    """The table with the hours of its runs, and those until the baseline's best score."""
    rows: list[Row] = []
    for labels, entries in layout.rows:
        more = [Entry("hours", entry.cell) for entry in entries if entry.quantity == "steps"]
        for entry in entries:
            if entry.quantity == "first_reaching" and entry.baseline:
                both = (entry.baseline, entry.cell)
                more += [Entry("hours", cell) for cell in both]
                more += [Entry("hours_to_best", cell, entry.baseline) for cell in both]
        rows.append((labels, [*entries, *more]))
    columns: list[Column] = [("", "hours")]
    if layout.baseline:
        groups = ("hours", "hours to the baseline's best")
        columns = [(group, role) for group in groups for role in ("baseline", "adaptive")]
    return replace(layout, columns=[*layout.columns, *columns], rows=rows)


SMALL = SettingLabel("{}", INITIAL, "64", "small")
MIDDLE = SettingLabel("{}", INITIAL, "128", "middle")
LARGE = SettingLabel("{}", INITIAL, "256", "large")

# fmt: off
TABLE2 = TableLayout(
    "table2",
    "Table 2: constant and adaptive batches",
    ("optimizer",),
    *_against_baseline(
        {
            "small": SettingLabel("B = {}", INITIAL, "64", "small"),
            "large": SettingLabel("B = {}", INITIAL, "256", "large"),
            "euclidean": "Euclidean adaptive",
            "adaptive": "adaptive",
        },
        {
            "signSGD": ("large", 22.58,
                        ((4.1390, 0.0235), (3.9357, 0.0057), (3.8906, 0.0117), (3.8396, 0.0012))),
            "Signum": ("small", 66.61,
                       ((3.3737, 0.0045), (3.4460, 0.0075), (3.3842, 0.0055), (3.3707, 0.0026))),
            "AdamW": ("small", 67.13,
                      ((3.2991, 0.0054), (3.3228, 0.0101), (3.3127, 0.0101), (3.3031, 0.0054))),
            "specSGD": ("small", 16.49,
                        ((3.7489, 0.0096), (3.9404, 0.0074), (3.7436, 0.0274), (3.7285, 0.0094))),
            "Muon": ("small", 66.77,
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
        {"baseline": SettingLabel("B = {}", INITIAL, "256", "baseline"), "adaptive": "adaptive"},
        {
            "signSGD": ("baseline", 31.84, ((3.1417, 0.0047), (2.9946, 0.0201))),
            "Signum": ("baseline", 12.11, ((2.8306, 0.0051), (2.8354, 0.0073))),
            "AdamW": ("baseline", None, ((2.7701, 0.0037), (2.8023, 0.0049))),
        },
    ),
    paper_scale="paper_1b",
    baseline="baseline: the constant batch of the same optimizer",
)
TABLE4 = TableLayout(
    "table4",
    "Table 4: SimpleViT on ImageWoof, constant and adaptive batches",
    ("optimizer",),
    *_against_baseline(
        {"baseline": SettingLabel("B = {}", INITIAL, "128", "baseline"), "adaptive": "adaptive"},
        {
            "MSGD": ("baseline", 14.9, ((1.1990, 0.0006), (1.1975, 0.0000008))),
            "SGD": ("baseline", 0.2, ((1.5910, 0.0097), (1.2850, 0.0007))),
            "NSGD": ("baseline", None, (NOT_PRINTED, NOT_PRINTED)),
            "signSGD": ("baseline", 37.5, ((1.2007, 0.000006), (1.1643, 0.0006))),
            "Signum": ("baseline", 55.2, ((1.3819, 0.0002), (1.1907, 0.0002))),
            "AdamW": ("baseline", 13.6, ((0.9727, 0.0002), (0.9584, 0.0000008))),
            "Muon": ("baseline", 13.0, ((0.6693, 0.0218), (0.6302, 0.0002))),
        },
    ),
    baseline="baseline: the constant batch of the same optimizer; MSGD: SGD with momentum; "
    "NSGD: normalized SGD, of which version 1 has no row; "
    "adaptive: by the noise scale of the optimizer's own geometry",
    unit=IMAGES,
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
            "theta_low": ((SettingLabel("{}", THETA, "0.5", "low"),), (3.6909, None), 7650),
            "theta_middle": ((SettingLabel("{}", THETA, "0.6", "middle"),), (3.6817, None), 9950),
            "theta_high": ((SettingLabel("{}", THETA, "0.7", "high"),), (3.7292, None), 12374),
        }
    ),
)
TABLE10 = TableLayout(
    "table10",
    "Table 10: ResNet-18 on CIFAR-10, constant and adaptive batches",
    ("optimizer", "adaptive from"),
    *_against_baseline(
        {"baseline": SettingLabel("B = {}", INITIAL, "512", "baseline"), "adaptive": "adaptive"},
        {
            "MSGD": ("baseline", 20.43, ((93.43, None), (93.44, None))),
            "SGD": ("baseline", 46.47, ((92.33, None), (92.74, None))),
            "NSGD": ("baseline", None, (NOT_PRINTED, NOT_PRINTED)),
            "signSGD": ("baseline", 76.46, ((93.13, None), (93.22, None))),
            "Signum": ("baseline", 73.40, ((93.59, None), (93.57, None))),
            "AdamW": ("baseline", None, ((94.16, None), (93.89, None))),
            "Muon": ("baseline", 85.19, ((94.69, None), (94.67, None))),
        },
        "accuracy",
        starts={
            "": SettingLabel("{}", INITIAL, "256", "small"),
            "_large": SettingLabel("{}", INITIAL, "1024", "large"),
        },
    ),
    baseline=f"{TABLE4.baseline}; the paper does not say with which of both its runs begin",
    score="accuracy",
    unit=IMAGES,
)
LAYOUTS = {
    layout.name: layout
    for layout in (TABLE2, TABLE3, TABLE4, TABLE8, TABLE9, TABLE10, THETA_SENSITIVITY)
}
# Files of the paper's arXiv source that hold a cell's curve, by table and cell, as a pattern.
PUBLISHED_CURVES = {
    ("table2", "signum_small"): "signum_64.csv",
    ("table2", "signum_large"): "signum_256.csv",
    ("table2", "signum_adaptive"): "signum_gns.csv",
    ("table2", "muon_small"): "MUON_64.csv",
    ("table2", "muon_large"): "MUON_256.csv",
    ("table2", "muon_adaptive"): "MUON_gns.csv",
    ("table8", "constant_small"): "baseline_64.csv",
    ("table8", "adaptive_small_scaled"): "signsgd_160m/seed_*.csv",
    ("table9", "euclidean_small"): "gns_l2.csv",
    ("table9", "manhattan_small"): "signsgd_160m/seed_*.csv",
    ("theta_sensitivity", "theta_middle"): "signsgd_160m/seed_*.csv",
}
