"""Filled tables as text, Markdown, LaTeX, CSV or JSON."""

import io
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table as TextTable

from gns_pretrain.results.frame import pd
from gns_pretrain.results.layouts import Quantity, Score, Statistic
from gns_pretrain.results.tables import FilledEntry, FilledTable
from gns_pretrain.system.terminal import Console

NO_RUN, NEVER, MARK, BEST = "no run", "-", "*", "↓"
NAMES_OF_BEST: dict[Score, str] = {
    "loss": "the lowest loss of those that are compared",
    "accuracy": "the highest accuracy of those that are compared",
}
LATEX = {
    "\\": r"\textbackslash ",
    **{character: f"\\{character}" for character in "%_&#{}"},
    "$": r"\$",
    "~": r"\textasciitilde ",
    "^": r"\textasciicircum ",
    "±": r"$\pm$",
}
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%" + "\n"
ONE_COLUMN = 5  # columns of a table fit beside another one
FORMULAS = {
    r"\bB = (\d[\d,.]*)": r"$B = \1$",
    r"\bB = (?=[a-z])": "$B$ = ",  # small, where no run says how large that is
    r"\b1 - a/b\b": "$1 - a/b$",
    r"(?<!\.)\btheta\b(?!\\)": r"$\\theta$",  # but no setting's or cell's name
}
HEADER_WIDTH = 15  # characters; about what a loss takes
WIDTH = 500  # characters of a line of text; none is wrapped


def number(quantity: Quantity, statistic: Statistic) -> str:
    """A number as the paper prints it."""
    if quantity == "share":
        return f"{statistic.reached}/{len(statistic.seeds)}"
    if statistic.value is None:
        return NEVER
    if quantity == "loss" or quantity == "accuracy":
        return score_text(statistic.value, statistic.deviation, quantity)
    if quantity == "steps":
        return f"{statistic.value:,.0f}" if statistic.value % 1 == 0 else f"{statistic.value:,.1f}"
    if quantity in ("hours", "hours_to_best"):
        return f"{statistic.value:.3g}"
    return f"{statistic.value:.2f}"


def score_text(mean: float, deviation: float | None, score: Score = "loss") -> str:
    """A loss (nats) or accuracy (percent), with its standard deviation over seeds if it has one."""
    digits = 4 if score == "loss" else 2
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def shown(
    table: FilledTable,
    *,
    best: Callable[[str], str],
    escape: Callable[[str], str] = str,
) -> pd.DataFrame:
    """Labels and numbers as texts; the paper's follow ours. Columns: group and title.

    Args:
        table: to show.
        best: emphasizes the number of the lowest loss.
        escape: of every text, before that.
    """

    def ours(filled: FilledEntry) -> str:
        if filled.statistic is None:
            return NO_RUN
        mark = MARK if filled.marked else ""
        text = escape(number(filled.entry.quantity, filled.statistic) + mark)
        return best(text) if filled.best else text

    def papers(filled: FilledEntry) -> str:
        entry = filled.entry
        return "" if entry.paper is None else escape(number(entry.quantity, entry.paper))

    lines = []
    for labels, entries in table.rows:
        lines.append([*map(escape, labels), *map(ours, entries)])
        if table.with_paper:
            lines.append(["  paper", *[""] * (len(labels) - 1), *map(papers, entries)])
    headers = [*(("", title) for title in table.layout.label_titles), *table.headers]
    escaped = [tuple(map(escape, header)) for header in headers]
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(escaped))


def as_text(table: FilledTable) -> str:
    """For a terminal; the grid is as wide as it must be and is not wrapped."""
    frame = shown(table, best=lambda text: BEST + text)
    labels = len(table.layout.label_titles)
    headers = [
        "\n".join(line for words in header for line in textwrap.wrap(words, HEADER_WIDTH))
        for header in frame.columns
    ]
    grid = text_grid(headers, frame.to_numpy(), left=labels)
    lowest = [f"{BEST} {NAMES_OF_BEST[table.layout.score]}"] if table.has_best else []
    return "\n".join([table.title, grid, *table.notes, *lowest, *table.explanations]) + "\n"


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
    frame = shown(table, best="**{}**".format, escape=_escape_markdown)
    lines = [[cell.strip() for cell in line] for line in frame.to_numpy()]
    notes = [_escape_markdown(note) for note in [*table.notes, *table.explanations]]
    notes += [f"bold: {NAMES_OF_BEST[table.layout.score]}"] if table.has_best else []
    headers = map(_flat, frame.columns)
    return markdown(table.title, headers, lines, notes, left=len(table.layout.label_titles))


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
    """A table environment for the packages booktabs and graphicx; across two columns if wide."""
    frame = shown(table, best=r"\textbf{{{}}}".format, escape=_escape_latex)
    frame = frame.map(lambda text: re.sub("^  ", r"\\quad ", text))
    labels = len(table.layout.label_titles)
    if not any(group for group, _ in frame.columns):
        frame.columns = frame.columns.get_level_values(1)
    name_of_best = NAMES_OF_BEST[table.layout.score]
    title = re.sub(r"^Table \d+: ", "", table.title)  # LaTeX numbers it
    sentences = [title, *table.explanations, *([f"bold: {name_of_best}"] if table.has_best else [])]
    drawn = frame.to_latex(
        index=False,
        escape=False,
        column_format="l" * labels + "r" * len(table.headers),
        multicolumn_format="c",
        caption=" ".join(f"{_escape_latex(_capitalized(text))}." for text in sentences),
        label=f"tab:{table.layout.name}",
    )
    notes = "".join(
        f"\\par\\raggedright\\footnotesize {_escape_latex(note)}\n" for note in table.notes
    )
    for plain, placed in (
        ("\\caption", "\\centering\n\\caption"),
        ("\\begin{tabular}", f"\\smallskip\n{FITTED}\\begin{{tabular}}"),
        ("\\end{tabular}", "\\end{tabular}}\\smallskip"),
        ("\\end{table}", f"{notes}\\end{{table}}"),
    ):
        drawn = drawn.replace(plain, placed)
    return drawn.replace("{table}", "{table*}") if len(frame.columns) > ONE_COLUMN else drawn


def _capitalized(text: str) -> str:
    """A sentence's first letter as a capital, unless it begins with a name such as signSGD."""
    return text[0].upper() + text[1:] if text.split()[0].rstrip(":").islower() else text


def _escape_latex(text: str) -> str:
    """Text as LaTeX reads it, with its formulas as such."""
    for plain, command in LATEX.items():
        text = text.replace(plain, command)
    for pattern, formula in FORMULAS.items():
        text = re.sub(pattern, formula, text)
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
    if quantity in NAMES_OF_BEST:
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
