"""The command line of scripts/benchmark.py: parse, measure, show and write down."""

import argparse
import gzip
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cost_model import RANKS_PER_NODE, paper_tables
from benchmarks.memory import measure_memory
from benchmarks.optimizer import default_device
from benchmarks.profile import profile_steps
from benchmarks.speed import measure_speed
from benchmarks.startup import measure_startup
from benchmarks.workload import OPTIMIZER_SETTINGS, Workload, write_random_tokens
from gns_pretrain.config.compose import read_yaml
from gns_pretrain.data.tokenization import train_bpe
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.runs.directory import git_revision

# What the sub-commands share: how one is described, and its model.

MODEL_CONFIGS = Path(__file__).resolve().parents[1] / "conf" / "model"


class Command(NamedTuple):
    """A sub-command: its arguments, and what it measures with them."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Iterable[dict[str, Any]]]


def add_model(parser: argparse.ArgumentParser, default: str | None = "tiny") -> None:
    """`--model` and `--vocab-size`."""
    parser.add_argument(
        "--model", choices=model_names(), default=default, help="a file in conf/model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="tokens, where the model leaves it to the data"
    )


def model_names() -> list[str]:
    """The files of conf/model."""
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.yaml"))


def model_config(name: str, vocab_size: int) -> LlamaConfig:
    """The shape in a file of conf/model."""
    values = read_yaml(MODEL_CONFIGS / f"{name}.yaml")
    del values["defaults"]
    scaling = RopeScaling(**values.pop("rope_scaling", {}))
    values["vocab_size"] = values.get("vocab_size") or vocab_size
    return LlamaConfig(**values, rope_scaling=scaling)


def require_at_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a number that is too small."""
    value = getattr(arguments, name)
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")


# The sub-commands that measure one part alone: model, data, noise scale, optimizer.

Row = dict[str, Any]


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--pairs", type=int, default=20, help="timed steps of each, at least 2")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both")


def _measure_model(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks.model import compare_with_transformers

    for name in ("vocab_size", "batch_size", "sequence_length"):
        require_at_least(arguments, name, 1)
    require_at_least(arguments, "pairs", 2)
    return [
        compare_with_transformers(
            model_config(arguments.model, arguments.vocab_size),
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            pairs=arguments.pairs,
            compiled=arguments.compile,
        )
    ]


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="token shards; default: random tokens")
    parser.add_argument("--files", nargs="+", help="documents; default: the embedded text")
    parser.add_argument("--tokenizer", help="tokenizer.json; default: a BPE of the embedded text")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens, for reading")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read")
    parser.add_argument("--rounds", type=int, default=3, help="preparations")


def _measure_data(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks.data import measure_preparation, measure_reading

    for name in ("sequence_length", "rounds"):
        require_at_least(arguments, name, 1)
    return [
        measure_reading(
            arguments.data,
            sequence_length=arguments.sequence_length,
            seconds=arguments.seconds,
        ),
        measure_preparation(arguments.files, arguments.tokenizer, rounds=arguments.rounds),
    ]


def _add_noise_scale_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1], help="processes; several: FSDP2"
    )
    parser.add_argument(
        "--geometry", nargs="+", default=["euclidean", "manhattan", "nuclear"], help="one row each"
    )
    parser.add_argument("--estimate", nargs="+", default=["plug_in"], help="all in one measurement")
    parser.add_argument("--square-root", default="auto", help="auto, iterative or exact")
    parser.add_argument("--samples", type=int, default=8, help="micro-batches over all ranks")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens")
    parser.add_argument("--pairs", type=int, default=20, help="timed steps of each, at least 2")


def _measure_noise_scale(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks.noise_scale import measure_cost
    from gns_pretrain.noise_scale.settings import NoiseScaleSettings

    for name in ("samples", "pairs"):
        require_at_least(arguments, name, 2)
    for ranks in arguments.ranks:
        if ranks < 1 or arguments.samples % ranks:
            raise InputError(f"--samples {arguments.samples} is no multiple of --ranks {ranks}")
    return [
        measure_cost(
            model_config(arguments.model, arguments.vocab_size),
            NoiseScaleSettings([geometry], arguments.estimate, square_root=arguments.square_root),
            num_ranks=ranks,
            micro_batch_size=arguments.micro_batch_size,
            accumulation=arguments.samples // ranks,
            sequence_length=arguments.sequence_length,
            pairs=arguments.pairs,
        )
        for ranks in arguments.ranks
        for geometry in arguments.geometry
    ]


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="llama3_160m")
    parser.add_argument("--layers", type=int, help="blocks; default: all. Time is linear in them")
    parser.add_argument("--pairs", type=int, default=5, help="timed steps of each, at least 2")
    parser.add_argument("--eager", action="store_true", help="sign rules without torch.compile")


def _measure_optimizer(arguments: argparse.Namespace) -> list[Row]:
    from benchmarks.optimizer import compare_muon, measure_sign_rule

    require_at_least(arguments, "pairs", 2)
    if arguments.layers is not None:
        require_at_least(arguments, "layers", 1)
    config = model_config(arguments.model, vocab_size=2)
    values = {"layers": arguments.layers, "pairs": arguments.pairs}
    signs = [
        measure_sign_rule(config, momentum=momentum, compiled=not arguments.eager, **values)
        for momentum in (0.0, 0.95)
    ]
    return [*signs, compare_muon(config, **values)]


PART_COMMANDS = {
    "model": Command(
        "a training step against transformers' LlamaForCausalLM",
        _add_model_arguments,
        _measure_model,
    ),
    "data": Command(
        "reading token shards, and preparing them from documents",
        _add_data_arguments,
        _measure_data,
    ),
    "noise_scale": Command(
        "a training step with a measurement of the noise scale against one without",
        _add_noise_scale_arguments,
        _measure_noise_scale,
    ),
    "optimizer": Command(
        "Muon's step against torch.optim.Muon's; sign rules against one pass over their tensors",
        _add_optimizer_arguments,
        _measure_optimizer,
    ),
}


# What `scripts/benchmark.py all` runs: a list of its own sub-commands with their arguments.

Plan = list[list[str]]


def gpu_plan() -> Plan:
    """The table for one GPU, the most wanted figures first; under ten minutes on an H200."""
    return [
        ["speed", "--model", "llama3_160m"],
        ["speed", "--model", "llama3_1b", "--pairs", "3"],
        ["profile", "--model", "llama3_160m", "--batch-size", "16"],
        ["profile", "--model", "llama3_160m", "--batch-size", "16", "--geometry", "nuclear"],
        ["memory", "--steps", "200"],
    ]


def cpu_plan() -> Plan:
    """The table for a CPU."""
    return [
        ["model"],
        ["model", "--compile"],
        ["speed"],
        ["noise_scale", "--ranks", "1", "2", "--pairs", "10"],
        ["optimizer", "--layers", "2"],
        ["profile"],
        ["data"],
        ["startup"],
        ["memory"],
    ]


def quick_plan(folder: Path) -> Plan:
    """Every sub-command at its smallest: that it works, not how fast.

    Args:
        folder: empty; takes the data.
    """
    shards = folder / "shards"
    shards.mkdir()
    write_random_tokens(shards, 64, {"train": 2**13, "validation": 2**10})
    documents, tokenizer = write_documents(folder)
    model = ["--model", "demo", "--vocab-size", "64"]
    text = ["--data", str(shards), "--files", str(documents), "--tokenizer", str(tokenizer)]
    sample = [*model, "--micro-batch-size", "1", "--sequence-length", "8"]
    step = [*sample, "--batch-size", "2", "--no-compile"]
    run = ["data=shards", f"data.path={shards}", "data.sequence_length=8", "token_budget=1024"]
    run += ["model=demo", "evaluation.num_sequences=1", "compile=never", "launch.threads=1"]
    return [
        ["model", *model, "--batch-size", "1", "--sequence-length", "8", "--pairs", "2"],
        ["data", *text, "--seconds", "0", "--rounds", "1", "--sequence-length", "8"],
        ["noise_scale", *sample, "--geometry", "manhattan", "--samples", "2", "--pairs", "2"],
        ["optimizer", *model, "--layers", "1", "--pairs", "2", "--eager"],
        ["profile", *step, "--steps", "1", "--geometry", "nuclear"],
        ["speed", *step, "--pairs", "2", "--product-size", "64"],
        ["startup", "--starts", "1", "--warm", *run],
        ["memory", *model, "--steps", "12"],
        ["paper", "--ranks", "8"],
    ]


def write_documents(folder: Path) -> tuple[Path, Path]:
    """A few documents in C4's schema, and a tokenizer of their words."""
    texts = ["the gradient of a small batch is noise", "a larger batch hears the signal"] * 8
    documents, tokenizer = folder / "documents.json.gz", folder / "tokenizer.json"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    documents.write_bytes(gzip.compress(lines.encode()))
    train_bpe(texts, 300).save(str(tokenizer))
    return documents, tokenizer


# What every figure carries: when, where, with what and by which command it was measured.

PACKAGES = ("numpy", "tokenizers", "transformers", "triton")


def provenance(arguments: list[str]) -> Row:
    """Date, machine, versions and command.

    Args:
        arguments: of scripts/benchmark.py.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    command = shlex.join(["python", "scripts/benchmark.py", *arguments])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"OMP_NUM_THREADS={threads} {command}" if threads else command,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> Row:
    """The processor, its cores, the memory and the GPU."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> Row:
    """Of Python, torch, CUDA, this code and the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "code": git_revision(),
        **found,
    }


# The sub-commands about whole steps and runs: profile, speed, startup, memory, paper.


# What a step is where nothing else is asked for.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "model": "llama3_160m",
        "batch_size": 64,
        "micro_batch_size": 8,
        "sequence_length": 2048,
        "compile": True,
        "pairs": 5,
        "product_size": 8192,
    },
    "cpu": {
        "model": "tiny",
        "batch_size": 16,
        "micro_batch_size": 2,
        "sequence_length": 128,
        "compile": False,
        "pairs": 10,
        "product_size": 1024,
    },
}


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default=None)
    parser.add_argument("--batch-size", type=int, help="sequences of a step; GPU: 64, CPU: 16")
    parser.add_argument("--micro-batch-size", type=int, help="sequences; GPU: 8, CPU: 2")
    parser.add_argument("--sequence-length", type=int, help="tokens; GPU: 2048, CPU: 128")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the blocks; GPU: yes, CPU: no",
    )


def _workload(arguments: argparse.Namespace, optimizer: str = "adamw") -> Workload:
    """The step that was asked for, with this device's defaults for the rest."""
    for name, value in DEFAULTS[default_device().type].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return Workload(
        model=model_config(arguments.model, arguments.vocab_size),
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        optimizer=optimizer,
        compiled=arguments.compile,
    )


def _add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    _add_workload_arguments(parser)
    parser.add_argument(
        "--optimizer", choices=list(OPTIMIZER_SETTINGS), default="adamw", help="rule"
    )
    parser.add_argument(
        "--geometry", choices=list(GEOMETRIES), help="measured in every step; or none"
    )
    parser.add_argument("--steps", type=int, default=3, help="profiled, after two that are not")
    parser.add_argument("--operators", type=int, default=12, help="how many to name")
    parser.add_argument("--trace", type=Path, help="Chrome trace to write: .json or .json.gz")


def _profile(arguments: argparse.Namespace) -> list[Row]:
    require_at_least(arguments, "steps", 1)
    return [
        profile_steps(
            _workload(arguments, arguments.optimizer),
            device=default_device(),
            geometry=arguments.geometry,
            steps=arguments.steps,
            operators=arguments.operators,
            trace=arguments.trace,
        )
    ]


def _add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    _add_workload_arguments(parser)
    parser.add_argument("--pairs", type=int, help="timed steps of each kind; GPU: 5, CPU: 10")
    parser.add_argument(
        "--product-size", type=int, help="n of the n x n x n product; GPU: 8192, CPU: 1024"
    )


def _speed(arguments: argparse.Namespace) -> Iterable[Row]:
    workload = _workload(arguments)
    require_at_least(arguments, "pairs", 2)
    require_at_least(arguments, "product_size", 1)
    if workload.accumulation < 2:
        raise InputError(
            f"--batch-size {workload.batch_size} is one micro-batch; a measurement compares at "
            f"least 2: use a multiple of {workload.micro_batch_size} above it"
        )
    return measure_speed(
        workload,
        device=default_device(),
        pairs=arguments.pairs,
        product_size=arguments.product_size,
    )


def _add_startup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="of train.py, such as model=small")
    parser.add_argument("--starts", type=int, default=3, help="timed, with a warm cache")
    parser.add_argument(
        "--warm", action="store_true", help="the cache is warm: no start before them"
    )


def _startup(arguments: argparse.Namespace) -> list[Row]:
    require_at_least(arguments, "starts", 1)
    return [measure_startup(arguments.overrides, starts=arguments.starts, cold=not arguments.warm)]


def _add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, default="demo")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")


def _memory(arguments: argparse.Namespace) -> list[Row]:
    require_at_least(arguments, "steps", 10)
    model = model_config(arguments.model, arguments.vocab_size)
    return [measure_memory(model, steps=arguments.steps, device=default_device())]


def _add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        choices=model_names(),
        default=["llama3_160m", "llama3_1b"],
        help="files in conf/model",
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64], help="GPUs")


def _paper(arguments: argparse.Namespace) -> list[Row]:
    for count in arguments.ranks:
        if count < 1 or (count > RANKS_PER_NODE and count % RANKS_PER_NODE):
            raise InputError(f"--ranks {count} are no whole nodes of {RANKS_PER_NODE} GPUs")
    models = [model_config(name, vocab_size=128_256) for name in arguments.model]
    return [{"measured": "nothing", "markdown": paper_tables(models, arguments.ranks)}]


STEP_COMMANDS = {
    "profile": Command("where a training step's time goes", _add_profile_arguments, _profile),
    "speed": Command(
        "tokens/s, share of the chip's product rate, Muon, a measurement, transformers",
        _add_speed_arguments,
        _speed,
    ),
    "startup": Command(
        "seconds from `python train.py` to its first step", _add_startup_arguments, _startup
    ),
    "memory": Command(
        "growth of memory with an adaptive batch and measurements", _add_memory_arguments, _memory
    ),
    "paper": Command(
        "operations and bytes of each phase on H100s, as Markdown; measures nothing",
        _add_paper_arguments,
        _paper,
    ),
}


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
