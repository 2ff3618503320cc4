"""What a table is before it has values: columns, rows, and the statistic at each place."""

from dataclasses import dataclass
from typing import Literal

from gns_pretrain.results.tables.statistics import Statistic

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
