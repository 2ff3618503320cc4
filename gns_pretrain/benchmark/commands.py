"""The command line of scripts/benchmark.py: parse, measure, show and write down."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from gns_pretrain.benchmark.arguments import Command
from gns_pretrain.benchmark.part_commands import PART_COMMANDS
from gns_pretrain.benchmark.plans import cpu_plan, gpu_plan, quick_plan
from gns_pretrain.benchmark.provenance import provenance
from gns_pretrain.benchmark.step_commands import STEP_COMMANDS
from gns_pretrain.errors import InputError

Row = dict[str, Any]
COMMANDS: dict[str, Command] = PART_COMMANDS | STEP_COMMANDS


def main(words: list[str], *, about: str | None = None) -> int:
    """Exit code 0: measured; 1: a part of `all` failed, the others are measured; 2: bad input."""
    arguments = parser(about).parse_args(words)
    failed = False
    try:
        with Output(arguments.json) as output:
            for part, row in rows_of(arguments, words):
                output.show(row, provenance(part))
                failed = failed or "failed" in row
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        return 2
    return int(failed)


def parser(about: str | None) -> argparse.ArgumentParser:
    """Of every sub-command."""
    whole = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    every = Command("all of these, with what suits this machine", add_all_arguments, lambda _: [])
    for name, command in (*COMMANDS.items(), ("all", every)):
        sub = commands.add_parser(
            name,
            help=command.about,
            description=command.about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument(
            "--json",
            nargs="?",
            const="-",
            metavar="FILE",
            help="one JSON object a line, with date, machine, versions and command; "
            "without FILE to the standard output, instead of tables",
        )
    return whole


def add_all_arguments(sub: argparse.ArgumentParser) -> None:
    """Of `all`."""
    sub.add_argument("--quick", action="store_true", help="each as briefly as can be: a smoke test")


def rows_of(arguments: argparse.Namespace, words: list[str]) -> Iterator[tuple[list[str], Row]]:
    """Each row as it is measured, with the command that measures it alone."""
    if arguments.command != "all":
        for row in COMMANDS[arguments.command].measure(arguments):
            yield words, row
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            plan = quick_plan(Path(folder))
        else:
            plan = gpu_plan() if torch.cuda.is_available() else cpu_plan()
        for part in plan:
            for row in part_of_all(part):
                yield part, row


def part_of_all(words: list[str]) -> Iterable[Row]:
    """One part's rows; what goes wrong in it becomes a row, and the others still run."""
    try:
        yield from COMMANDS[words[0]].measure(parser(None).parse_args(words))
    except Exception as error:
        yield {"measured": words[0], "failed": f"{type(error).__name__}: {error}"}


class Output:
    """Where rows go: tables to the terminal, JSON to a file as it comes, or JSON alone.

    Args:
        target: of `--json`; None: tables only; "-": JSON to the standard output; else a file.
    """

    def __init__(self, target: str | None) -> None:
        self.target = target
        self._file: TextIO | None = None

    def __enter__(self) -> "Output":
        if self.target not in (None, "-"):
            try:
                self._file = Path(str(self.target)).open("w")
            except OSError as error:
                raise InputError(
                    f"--json {self.target} cannot be written ({error.strerror}); "
                    "name a file in a folder that exists"
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def show(self, row: Row, origin: Row) -> None:
        """One row; where it comes from stands in the JSON."""
        line = json.dumps(row | origin) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        if self.target == "-":
            sys.stdout.write(line)
        elif "markdown" in row:
            sys.stdout.write(row["markdown"])
        else:
            for table in tables(row):
                Console().print(table)


def tables(row: Row) -> Iterator[Table]:
    """A row for people, and each list of rows within it by itself."""
    plain = Table(show_header=False)
    lists = {key: value for key, value in row.items() if is_list_of_rows(value)}
    for key, value in row.items():
        if key not in lists:
            plain.add_row(words_of(key), shown(value))
    yield plain
    for rows in lists.values():
        inner = Table(*map(words_of, rows[0]))
        for entry in rows:
            inner.add_row(*map(shown, entry.values()))
        yield inner


def is_list_of_rows(value: Any) -> bool:
    """Whether a row holds rows of its own."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def words_of(key: str) -> str:
    """A key for people."""
    return key.replace("_", " ")


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
