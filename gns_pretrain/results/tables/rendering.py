"""A filled table as text, Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table as TextTable

from gns_pretrain.results.tables.layouts import Kind, Statistic
from gns_pretrain.results.tables.table import FilledEntry, FilledTable

NO_RUN, NEVER, MARK = "no run", "-", "*"
HEADER_WIDTH = 15  # characters; about what a loss takes


def number(kind: Kind, statistic: Statistic) -> str:
    """A number as the paper prints it."""
    if kind == "share":
        return f"{statistic.reached}/{len(statistic.seeds)}"
    if statistic.value is None:
        return NEVER
    if kind == "loss":
        spread = "" if statistic.deviation is None else f" ± {statistic.deviation:.4f}"
        return f"{statistic.value:.4f}{spread}"
    if kind == "steps":
        return f"{statistic.value:,.0f}" if statistic.value % 1 == 0 else f"{statistic.value:,.1f}"
    return f"{statistic.value:.2f}"


def ours(filled: FilledEntry) -> str:
    """What our runs give, marked where seeds are missing."""
    if filled.statistic is None:
        return NO_RUN
    return number(filled.entry.kind, filled.statistic) + (MARK if filled.marked else "")


def papers(filled: FilledEntry) -> str:
    """What the paper prints there; empty where it prints nothing."""
    entry = filled.entry
    return "" if entry.paper is None else number(entry.kind, entry.paper)


def cells(table: FilledTable) -> list[list[str]]:
    """Labels and numbers of every line; the paper's follow ours."""
    lines = []
    for row in table.rows:
        lines.append([*row.labels, *(ours(entry) for entry in row.entries)])
        if table.with_paper:
            blank = [""] * (len(row.labels) - 1)
            lines.append(["  paper", *blank, *(papers(entry) for entry in row.entries)])
    return lines


def flat_headers(table: FilledTable, between: str) -> list[str]:
    """Headers in one line each."""
    return [
        *table.layout.label_titles,
        *(between.join(filter(None, header)) for header in table.headers),
    ]


def as_text(table: FilledTable) -> str:
    """For a terminal; the grid is as wide as it must be and is not wrapped."""
    grid = TextTable()
    for title in table.layout.label_titles:
        grid.add_column(title, no_wrap=True)
    for header in table.headers:
        lines = [line for words in header for line in textwrap.wrap(words, HEADER_WIDTH)]
        grid.add_column("\n".join(lines), justify="right", no_wrap=True)
    for line in cells(table):
        grid.add_row(*line)
    drawn = io.StringIO()
    Console(file=drawn, width=500).print(grid)
    below = [*table.notes, *table.explanations]
    return "\n".join([table.title, drawn.getvalue().rstrip(), *below]) + "\n"


def as_markdown(table: FilledTable) -> str:
    """A table of GitHub's Markdown, with its notes as a list."""
    labels = len(table.layout.label_titles)
    headers = flat_headers(table, ": ")
    rule = ["---" if index < labels else "---:" for index in range(len(headers))]
    lines = [f"**{table.title}**", ""]
    lines += ["| " + " | ".join(line) + " |" for line in [headers, rule, *_starred(table)]]
    lines += ["", *(f"- {_escaped_star(note)}" for note in [*table.notes, *table.explanations])]
    return "\n".join(lines) + "\n"


def _starred(table: FilledTable) -> list[list[str]]:
    return [[_escaped_star(cell.strip()) for cell in line] for line in cells(table)]


def _escaped_star(text: str) -> str:
    return text.replace("*", r"\*").replace("_", r"\_")


def as_latex(table: FilledTable) -> str:
    """A table environment for the package booktabs."""
    labels = len(table.layout.label_titles)
    groups = ["", *(group for group, _ in table.headers)]
    titles = [*table.layout.label_titles, *(title for _, title in table.headers)]
    body = [titles, *cells(table)]
    lines = [
        r"\begin{table}",
        rf"  \caption{{{_latex(table.title)}. {_latex('. '.join(table.explanations))}.}}",
        rf"  \label{{tab:{table.layout.name}}}",
        rf"  \begin{{tabular}}{{{'l' * labels}{'r' * len(table.headers)}}}",
        r"    \toprule",
        *([_group_line(groups[1:], labels)] if any(groups) else []),
        f"    {_latex_line(body[0])}",
        r"    \midrule",
        *(f"    {_latex_line(line)}" for line in body[1:]),
        r"    \bottomrule",
        r"  \end{tabular}",
        *(rf"  \par\footnotesize {_latex(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _group_line(groups: list[str], labels: int) -> str:
    """Headers over several columns."""
    spans: list[tuple[str, int]] = []
    for group in groups:
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1] + 1)
        else:
            spans.append((group, 1))
    words = [rf"\multicolumn{{{width}}}{{c}}{{{_latex(group)}}}" for group, width in spans]
    return "    " + " & ".join([""] * labels + words) + r" \\"


def _latex_line(words: list[str]) -> str:
    return " & ".join(_latex(word.strip()) for word in words) + r" \\"


def _latex(text: str) -> str:
    for plain, command in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("&", r"\&")):
        text = text.replace(plain, command)
    return text


def as_csv(table: FilledTable) -> str:
    """The layout with bare numbers, deviations and shares in columns of their own."""
    headers = list(table.layout.label_titles)
    lines: list[list[Any]] = [headers]
    for (group, title), entry in zip(table.headers, table.layout.rows[0].entries, strict=True):
        name = f"{group}: {title}" if group else title
        headers += [name]
        if entry.kind == "loss":
            headers += [f"{name}, standard deviation", f"{name}, seeds"]
        if table.with_paper and entry.paper is not None:
            headers += [f"{name}, paper"]
    for row in table.rows:
        line: list[Any] = list(row.labels)
        for filled in row.entries:
            line += _bare(filled, table.with_paper)
        lines.append(line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _bare(filled: FilledEntry, with_paper: bool) -> list[Any]:
    statistic, kind = filled.statistic or Statistic(None), filled.entry.kind
    if kind == "share":
        return [number(kind, statistic) if filled.statistic else ""]
    never = NEVER if filled.statistic else ""
    words: list[Any] = [never if statistic.value is None else statistic.value]
    if kind == "loss":
        words += ["" if statistic.deviation is None else statistic.deviation, len(statistic.seeds)]
    if with_paper and filled.entry.paper is not None:
        value = filled.entry.paper.value
        words += [NEVER if value is None else value]
    return words


def as_json(table: FilledTable) -> str:
    """Everything, for another program."""
    rows = [
        {
            "labels": dict(zip(table.layout.label_titles, row.labels, strict=True)),
            "entries": [
                {
                    "column": ": ".join(filter(None, header)),
                    "kind": filled.entry.kind,
                    "cell": filled.entry.cell,
                    "baseline": filled.entry.baseline,
                    "ours": filled.statistic and asdict(filled.statistic),
                    "missing_seeds": filled.marked,
                    "paper": _paper_values(filled) if table.with_paper else None,
                }
                for header, filled in zip(table.headers, row.entries, strict=True)
            ],
        }
        for row in table.rows
    ]
    content = {
        "table": table.layout.name,
        "scale": table.scale,
        "title": table.title,
        "rows": rows,
        "notes": table.notes,
        "explanations": table.explanations,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _paper_values(filled: FilledEntry) -> dict[str, float | None] | None:
    paper = filled.entry.paper
    return None if paper is None else {"value": paper.value, "deviation": paper.deviation}


FORMATS: dict[str, Callable[[FilledTable], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
