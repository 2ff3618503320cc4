"""Text for a terminal: names and texts out of files are shown, never obeyed.

A folder's name, a run's error or a label may hold escape sequences, which move the cursor, hide
lines or type into the shell, and rich's own markup. Whatever is printed goes through here, or, for
the line of an error, through `errors.printable`.
"""

import shutil
import sys
import textwrap
from typing import Any, TextIO

from rich import console as rich_console
from rich.text import Text

from gns_pretrain.errors import printable


class Console(rich_console.Console):  # noqa: TID251
    """rich's console, for strings without markup: tables and lines show them as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, in a table's cell as well, becomes a Text here."""
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


def write(*texts: object, file: TextIO | None = None) -> None:
    """Print each text on lines of its own, to standard output unless told otherwise."""
    for text in texts:
        print(printable(str(text)), file=file or sys.stdout, flush=True)


def wrapped(line: str, *, indent: int) -> str:
    """Break a line between words where standard output is a terminal that is too narrow for it."""
    if not sys.stdout.isatty():
        return line
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(
        line,
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
