"""Measure this code's speed, each thing by a subcommand.

python scripts/benchmark.py noise_scale --ranks 1 2    one of the subcommands below
python scripts/benchmark.py all --json FILE            all of them; --quick: smoke test

`all` is a plan: a list of the other subcommands with their arguments, for a GPU, for a CPU, or at
their smallest.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
from rich.table import Table

from benchmarks.checkpoint import Checkpoint
from benchmarks.data import Data, write_documents
from benchmarks.harness import Command, Row, provenance, write_random_tokens
from benchmarks.loss import LossBenchmark
from benchmarks.memory import Memory
from benchmarks.model import Model
from benchmarks.noise_scale import NoiseScale
from benchmarks.optimizer import Optimizer
from benchmarks.plan import Plan
from benchmarks.profile import Profile
from benchmarks.speed import Speed
from benchmarks.startup import Startup
from gns_pretrain.errors import InputError, print_error
from gns_pretrain.fields import About, add_options, at_home, from_options
from gns_pretrain.system.terminal import Console


@dataclass
class All(Command):
    """All of the other subcommands, with what suits this machine."""

    quick: Annotated[bool, About("each at its smallest: a smoke test")] = False


COMMANDS: dict[str, type[Command]] = {
    "model": Model,
    "data": Data,
    "loss": LossBenchmark,
    "noise_scale": NoiseScale,
    "optimizer": Optimizer,
    "profile": Profile,
    "speed": Speed,
    "startup": Startup,
    "checkpoint": Checkpoint,
    "memory": Memory,
    "plan": Plan,
    "all": All,
}

# The most wanted figures first; small micro-batches where two 1B models share 80 GB.
GPU_PLAN = (
    "speed --model llama3_160m",
    "speed --model llama3_1b --pairs 3 --parts step muon",
    "model --model llama3_1b --batch-size 2 --sequence-length 2048 --compile --pairs 5",
    "noise_scale --model llama3_1b --geometry nuclear --estimate plug_in cross_fitted --samples 2"
    " --micro-batch-size 1 --sequence-length 2048 --pairs 2",
    "noise_scale --model llama3_1b --geometry nuclear --micro-batch-size 8 --sequence-length 2048"
    " --pairs 2 --read-after-steps 8",
    "loss",
    "optimizer",
    "profile --model llama3_160m --batch-size 16",
    "profile --model llama3_160m --batch-size 16 --geometry nuclear",
    "checkpoint --model llama3_1b --batch-size 2 --micro-batch-size 1 --sequence-length 128",
    "memory --steps 200",
)
CPU_PLAN = (
    "model",
    "model --compile",
    "speed",
    "loss",
    "noise_scale --ranks 1 2 --pairs 10",
    "optimizer --layers 2",
    "profile",
    "data",
    "startup",
    "checkpoint",
    "memory",
)
# That each works, not how fast. {folder} holds what `write_quick_data` wrote.
QUICK_MODEL = "--model demo --vocab-size 64"
QUICK_SAMPLE = f"{QUICK_MODEL} --micro-batch-size 1 --sequence-length 8"
QUICK_PLAN = (
    f"model {QUICK_MODEL} --batch-size 1 --sequence-length 8 --pairs 2",
    "data --data {folder}/shards --files {folder}/documents.0.json.gz"
    " --tokenizer {folder}/tokenizer.json --seconds 0 --rounds 1 --sequence-length 8",
    f"noise_scale {QUICK_SAMPLE} --geometry manhattan --samples 2 --pairs 2",
    "noise_scale --foreign resnet --micro-batch-size 1 --geometry nuclear --samples 2 --pairs 2",
    f"loss {QUICK_MODEL} --tokens 8 --pairs 2",
    f"optimizer {QUICK_MODEL} --layers 1 --pairs 2 --eager",
    f"profile {QUICK_SAMPLE} --batch-size 2 --no-compile --steps 1 --geometry nuclear",
    f"speed {QUICK_SAMPLE} --batch-size 2 --no-compile --pairs 2 --product-size 64",
    "startup --starts 1 --warm data=shards data.path={folder}/shards data.sequence_length=8"
    " token_budget=1024 model=demo evaluation.num_sequences=1 compile=never launch.threads=1",
    f"checkpoint {QUICK_SAMPLE} --batch-size 2 --no-compile",
    f"memory {QUICK_MODEL} --steps 12",
    f"plan {QUICK_MODEL} --gpus 8 --micro-batch-size 1 --sequence-length 8",
)


def main(words: Sequence[str]) -> int:
    """Run a command line; return its exit code.

    Returns:
        0: measured; 1: a part of `all` failed, the others are measured; 2: bad input.
    """
    options = parser().parse_args(words)
    failed = False
    try:
        with json_file(options.json) as file:
            for part, row in measured_rows(options, words):
                if file:
                    print(json.dumps(row | provenance(part)), file=file, flush=True)
                if file is not sys.stdout:
                    show(row)
                failed = failed or "failed" in row
    except InputError as error:
        return print_error(error)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand; `command` of what it parses is its class."""
    whole = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = whole.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").splitlines()[0]
        aliases = ["roofline"] if command is Plan else []  # its name before it took real steps
        sub = subcommands.add_parser(name, aliases=aliases, help=text, description=text)
        sub.set_defaults(command=command)
        add_options(sub, command)
        sub.add_argument(
            "--json",
            type=at_home,
            nargs="?",
            const="-",
            metavar="FILE",
            help="one JSON object a line, with date, machine, versions and command; "
            "without FILE to the standard output, instead of tables",
        )
    return whole


def measured_rows(
    options: argparse.Namespace, words: Sequence[str]
) -> Iterator[tuple[Sequence[str], Row]]:
    """Yield each row as it is measured, with the words that measure it alone.

    What goes wrong in a part of `all` becomes a row, and the others still run.
    """
    if options.command is not All:
        for row in from_options(options.command, options).run():
            yield words, row
        return
    with tempfile.TemporaryDirectory() as folder:
        plan: Sequence[str] = GPU_PLAN if torch.cuda.is_available() else CPU_PLAN
        if from_options(All, options).quick:
            plan = QUICK_PLAN
            write_quick_data(Path(folder))
        for line in plan:
            part = [word.format(folder=folder) for word in line.split()]
            try:
                chosen = parser().parse_args(part)
                for row in from_options(chosen.command, chosen).run():
                    yield part, row
            except Exception as error:
                yield part, {"measured": part[0], "failed": f"{type(error).__name__}: {error}"}


def write_quick_data(folder: Path) -> None:
    """Write token shards, documents and a tokenizer."""
    write_random_tokens(folder / "shards", 64, {"train": 2**13, "validation": 2**10})
    texts = ["the gradient of a small batch is noise", "a larger batch hears the signal"] * 8
    write_documents(folder, texts, num_files=1, vocab_size=300)


def json_file(target: str | None) -> AbstractContextManager[TextIO | None]:
    """Open the file of `--json`; "-" is the standard output, None none."""
    if target in (None, "-"):
        return nullcontext(sys.stdout if target else None)
    try:
        return Path(str(target)).open("w")
    except OSError as error:
        raise InputError(
            f"--json {target} cannot be written ({error.strerror}); "
            "name a file in a folder that exists"
        ) from error


def show(row: Row) -> None:
    """Print a row as a table, and each list of rows within it as a table of its own."""
    plain = Table(show_header=False)
    tables = [plain]
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append(Table(title=key.replace("_", " "), title_justify="left"))
            for name, entry in value[0].items():
                left = isinstance(entry, str)
                tables[-1].add_column(name.replace("_", " "), justify="left" if left else "right")
            for entry in value:
                tables[-1].add_row(*map(formatted, entry.values()))
        else:
            plain.add_row(key.replace("_", " "), formatted(value))
    for table in tables:
        Console().print(table)


def formatted(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)
