"""The sub-commands about whole steps and runs: profile, speed, startup, memory, paper."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gns_pretrain.benchmark.arguments import (
    Command,
    add_model,
    model_config,
    model_names,
    require_at_least,
)
from gns_pretrain.benchmark.cluster import RANKS_PER_NODE
from gns_pretrain.benchmark.memory import measure_memory
from gns_pretrain.benchmark.paper import paper_tables
from gns_pretrain.benchmark.profile import profile_steps
from gns_pretrain.benchmark.speed import measure_speed
from gns_pretrain.benchmark.startup import measure_startup
from gns_pretrain.benchmark.workload import OPTIMIZER_SETTINGS, Workload
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.measurement import ESTIMATES
from gns_pretrain.optim.benchmark import default_device

Row = dict[str, Any]

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
        "--geometry", choices=list(ESTIMATES), help="measured in every step; or none"
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
