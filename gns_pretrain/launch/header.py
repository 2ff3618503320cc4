"""What a run is about to do, for its log: shown before anything is built or written."""

from pathlib import Path

import torch
from rich.filesize import decimal

from gns_pretrain.config.checks import Memory
from gns_pretrain.config.schema import Config
from gns_pretrain.data.mixture import Mixture, Source
from gns_pretrain.errors import counted
from gns_pretrain.model.config import count_parameters
from gns_pretrain.system.processes import threads_per_process
from gns_pretrain.tracking.console import short_number

TEXT_COLUMN = 11  # where the lines' texts begin
FAR_LARGER = 2  # times the data's vocabulary, which padding it does not reach


def tokens_and_epochs(source: Source, budget: float) -> str:
    """Describe a source, of which a run takes `budget` tokens."""
    there = source.tokens.num_tokens
    return (
        f"{short_number(there)} tokens to train on; the budget of {short_number(budget)} is "
        f"{budget / there:.3g} epochs"
    )


def header(
    config: Config,
    *,
    num_ranks: int,
    ranks_per_node: int,
    device: torch.device,
    training: Mixture,
    memory: Memory,
    directory: Path,
    begins: str,
) -> list[str]:
    """Format a run's plan, a line for each subject.

    Args:
        training: the training split.
        memory: as `check_memory` counts it.
        begins: with what.
    """
    data_vocab_size = training.vocab_size
    model = config.model.of_data(data_vocab_size)
    parameters = count_parameters(model)
    on_gpu = device.type == "cuda"
    threads = config.launch.threads or threads_per_process(ranks_per_node)
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {counted(threads, 'thread')}"
    nodes = -(-num_ranks // ranks_per_node)
    layout = config.parallel.resolved_kind(num_ranks)
    if config.parallel.tensor_size > 1:
        layout += f", parallel.tensor_size={config.parallel.tensor_size}"
    length, batch = config.data.sequence_length, config.batch_size
    sources = [
        f"{source.name} {weight:.3g} ({tokens_and_epochs(source, config.token_budget * weight)})"
        for source, weight in zip(training.sources, training.weights, strict=True)
    ]
    text = f"{config.data.path} of {', '.join(sources)}"
    if len(sources) == 1:
        text = f"{config.data.path}, {tokens_and_epochs(training.sources[0], config.token_budget)}"
    if config.data.document_mask:
        text += "; attention within documents"
    measured = ", ".join(config.noise_scale.geometries) or "not measured"
    if config.noise_scale.geometries:
        measured += f", every {counted(config.noise_scale.every_steps, 'step')}"
    at_first = "" if batch.policy == "constant" else " at the first batch size"
    lines = {
        "model": f"{model.name}, {parameters.total:,} parameters ({parameters.in_blocks:,} in "
        f"blocks), {config.dtype_on(device.type)}",
        "device": f"{where}; {counted(num_ranks, 'rank')} on {counted(nodes, 'node')}, {layout}",
        "data": text,
        "batch": f"{counted(batch.initial, 'sequence')} x {length:,} = {batch.initial * length:,} "
        f"tokens, {batch.policy}; {counted(config.initial_total_steps, 'step')}{at_first}",
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, "
        f"{config.schedule.kind}; noise scale {measured}",
        "memory": f"at least {decimal(memory.needed)} of {decimal(memory.there)}"
        f"{' on each GPU' if on_gpu else ''}; a checkpoint takes {decimal(memory.checkpoint)}",
        "run": f"{directory}, {begins}",
    }
    shown = [f"{name:{TEXT_COLUMN}}{text}" for name, text in lines.items()]
    if model.known_vocab_size >= FAR_LARGER * data_vocab_size:
        unused = (model.known_vocab_size - data_vocab_size) * model.dim
        unused *= 1 if model.tie_embeddings else 2
        shown.append(
            f"note: model.vocab_size={model.known_vocab_size:,}, but the data has "
            f"{data_vocab_size:,} token ids: {short_number(unused)} parameters are of ids that "
            "never come; model.vocab_size=null takes the data's"
        )
    return shown
