"""Filled tables as text, Markdown, LaTeX, CSV or JSON."""

import io
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table as TextTable

from gns_pretrain.results.frame import pd
from gns_pretrain.results.layouts import Quantity, Statistic
from gns_pretrain.results.tables import FilledEntry, FilledTable
from gns_pretrain.system.terminal import Console

NO_RUN, NEVER, MARK = "no run", "-", "*"
HEADER_WIDTH = 15  # characters; about what a loss takes
WIDTH = 500  # characters of a line of text; none is wrapped


def number(quantity: Quantity, statistic: Statistic) -> str:
    """A number as the paper prints it."""
    if quantity == "share":
        return f"{statistic.reached}/{len(statistic.seeds)}"
    if statistic.value is None:
        return NEVER
    if quantity == "loss":
        return loss_text(statistic.value, statistic.deviation)
    if quantity == "steps":
        return f"{statistic.value:,.0f}" if statistic.value % 1 == 0 else f"{statistic.value:,.1f}"
    return f"{statistic.value:.2f}"


def loss_text(mean: float, deviation: float | None) -> str:
    """A loss (nats per token) with its standard deviation over seeds, if there is one."""
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def shown(table: FilledTable) -> pd.DataFrame:
    """Labels and numbers as texts; the paper's follow ours. Columns: group and title."""

    def ours(filled: FilledEntry) -> str:
        if filled.statistic is None:
            return NO_RUN
        return number(filled.entry.quantity, filled.statistic) + (MARK if filled.marked else "")

    def papers(filled: FilledEntry) -> str:
        entry = filled.entry
        return "" if entry.paper is None else number(entry.quantity, entry.paper)

    lines = []
    for labels, entries in table.rows:
        lines.append([*labels, *map(ours, entries)])
        if table.with_paper:
            lines.append(["  paper", *[""] * (len(labels) - 1), *map(papers, entries)])
    headers = [*(("", title) for title in table.layout.label_titles), *table.headers]
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(headers))


def as_text(table: FilledTable) -> str:
    """For a terminal; the grid is as wide as it must be and is not wrapped."""
    frame, labels = shown(table), len(table.layout.label_titles)
    headers = [
        "\n".join(line for words in header for line in textwrap.wrap(words, HEADER_WIDTH))
        for header in frame.columns
    ]
    grid = text_grid(headers, frame.to_numpy(), left=labels)
    return "\n".join([table.title, grid, *table.notes, *table.explanations]) + "\n"


def text_grid(
    headers: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 0, **style: Any
) -> str:
    """Lines in columns, of which the first `left` are aligned to the left; `style` as rich has."""
    grid = TextTable(**style)
    for index, header in enumerate(headers):
        grid.add_column(header, justify="left" if index < left else "right", no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    drawn = io.StringIO()
    Console(file=drawn, width=WIDTH).print(grid)
    return "\n".join(line.rstrip() for line in drawn.getvalue().rstrip().splitlines())


def as_markdown(table: FilledTable) -> str:
    """A table of GitHub's Markdown, with its notes as a list."""
    frame, labels = shown(table), len(table.layout.label_titles)
    lines = [[_escape_markdown(cell.strip()) for cell in line] for line in frame.to_numpy()]
    notes = [_escape_markdown(note) for note in [*table.notes, *table.explanations]]
    return markdown(table.title, map(_flat, frame.columns), lines, notes, left=labels)


def markdown(
    title: str,
    headers: Iterable[str],
    lines: Iterable[Sequence[str]],
    notes: Iterable[str],
    *,
    left: int = 0,
) -> str:
    """A title, a table whose first `left` columns are aligned to the left, and notes below it."""
    headers = list(headers)
    rule = ["---" if index < left else "---:" for index in range(len(headers))]
    rows = ["| " + " | ".join(line) + " |" for line in [headers, rule, *lines]]
    return "\n".join([f"**{title}**", "", *rows, "", *(f"- {note}" for note in notes)]) + "\n"


def _escape_markdown(text: str) -> str:
    return text.replace("*", r"\*").replace("_", r"\_")


def _flat(header: tuple[str, str]) -> str:
    return ": ".join(filter(None, header))


def as_latex(table: FilledTable) -> str:
    """A table environment for the package booktabs."""
    frame = shown(table).map(str.strip)
    labels = len(table.layout.label_titles)
    if not any(group for group, _ in frame.columns):
        frame.columns = frame.columns.get_level_values(1)
    escaped = frame.to_latex(
        index=False,
        escape=True,
        column_format="l" * labels + "r" * len(table.headers),
        multicolumn_format="c",
        caption=_escape_latex(f"{table.title}. {'. '.join(table.explanations)}."),
        label=f"tab:{table.layout.name}",
    )
    notes = "".join(f"\\par\\footnotesize {_escape_latex(note)}\n" for note in table.notes)
    end = "\\end{table}\n"
    return escaped.replace("±", r"$\pm$").replace(end, notes + end)


def _escape_latex(text: str) -> str:
    for plain, command in (("%", r"\%"), ("_", r"\_"), ("&", r"\&")):
        text = text.replace(plain, command)
    return text


def as_csv(table: FilledTable) -> str:
    """The layout with bare numbers; deviations, seeds and the paper's in columns of their own."""
    lines = []
    for labels, entries in table.rows:
        line: list[tuple[str, Any]] = list(zip(table.layout.label_titles, labels, strict=True))
        for header, filled in zip(table.headers, entries, strict=True):
            line += _bare(_flat(header), filled, table.with_paper)
        lines.append(line)
    frame = pd.DataFrame([[value for _, value in line] for line in lines], dtype=object)
    return frame.to_csv(index=False, header=[name for name, _ in lines[0]], lineterminator="\n")


def _bare(name: str, filled: FilledEntry, with_paper: bool) -> list[tuple[str, Any]]:
    """Columns of an entry in a CSV."""
    ours, quantity, paper = filled.statistic, filled.entry.quantity, filled.entry.paper
    if quantity == "share":
        return [(name, ours and number(quantity, ours))]
    columns: list[tuple[str, Any]] = [(name, ours and _or_never(ours.value))]
    if quantity == "loss":
        columns.append((f"{name}, standard deviation", ours and ours.deviation))
        columns.append((f"{name}, seeds", len(ours.seeds) if ours else 0))
    if with_paper and paper is not None:
        columns.append((f"{name}, paper", _or_never(paper.value)))
    return columns


def _or_never(value: float | None) -> float | str:
    return NEVER if value is None else value


def as_json(table: FilledTable) -> str:
    """Everything, for another program."""

    def content(header: tuple[str, str], filled: FilledEntry) -> dict[str, Any]:
        entry = filled.entry
        paper = entry.paper if table.with_paper else None
        return {
            "column": _flat(header),
            "kind": entry.quantity,
            "cell": entry.cell,
            "baseline": entry.baseline,
            "ours": filled.statistic and asdict(filled.statistic),
            "missing_seeds": filled.marked,
            "paper": paper and {"value": paper.value, "deviation": paper.deviation},
        }

    document = {
        "table": table.layout.name,
        "scale": table.scale,
        "title": table.title,
        "rows": [
            {
                "labels": dict(zip(table.layout.label_titles, labels, strict=True)),
                "entries": list(map(content, table.headers, entries)),
            }
            for labels, entries in table.rows
        ],
        "notes": table.notes,
        "explanations": table.explanations,
    }
    return json.dumps(document, indent=1) + "\n"


FORMATS: dict[str, Callable[[FilledTable], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
