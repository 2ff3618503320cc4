"""The sub-commands that measure one part alone: model, data, noise scale, optimizer."""

import argparse
from pathlib import Path
from typing import Any

from gns_pretrain.benchmark.arguments import Command, add_model, model_config, require_at_least
from gns_pretrain.errors import InputError

Row = dict[str, Any]


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--pairs", type=int, default=20, help="timed steps of each, at least 2")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both")


def _measure_model(arguments: argparse.Namespace) -> list[Row]:
    from gns_pretrain.model.benchmark import compare_with_transformers

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
    from gns_pretrain.data.benchmark import measure_preparation, measure_reading

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
    from gns_pretrain.noise_benchmark import measure_cost
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
    from gns_pretrain.optim.benchmark import compare_muon, measure_sign_rule

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
