"""Rules between settings of different groups, ranks and data, checked before anything starts.

Each function raises an InputError at the first rule that is broken.
"""

import math

import torch

from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, counted
from gns_pretrain.model.config import count_parameters
from gns_pretrain.parallel.mesh import shard_group_size
from gns_pretrain.system.processes import machine_memory


def check_layout(config: Config, *, num_ranks: int, ranks_per_node: int) -> None:
    """Check settings against the ranks; reads no file."""
    kind = config.parallel.resolved_kind(num_ranks)
    if kind == "single" and num_ranks > 1:
        raise InputError(
            f"parallel.kind=single is one process, but {num_ranks} were asked for; "
            "use parallel=fsdp, ddp or hsdp, or launch.nproc_per_node=1"
        )
    check_tensor_size(config, num_ranks=num_ranks)
    if kind == "hsdp":
        shard_group_size(config.parallel, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    if config.launch.device == "cuda" and not torch.cuda.is_available():
        raise InputError("launch.device=cuda, but torch sees no GPU here; use launch.device=cpu")
    step_tokens = config.batch_size.initial * config.data.sequence_length
    if config.token_budget < step_tokens:
        raise InputError(
            f"token_budget={config.token_budget} is less than one step's {step_tokens} tokens "
            f"(batch_size.initial={config.batch_size.initial} x data.sequence_length="
            f"{config.data.sequence_length}); raise it, or make the batch smaller"
        )


def check_tensor_size(config: Config, *, num_ranks: int) -> None:
    """Check that tensor parallelism splits the ranks, and heads and hidden units evenly."""
    size, model = config.parallel.tensor_size, config.model
    config.parallel.num_data_ranks(num_ranks)
    widths = {name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "ffn_dim")}
    for name, width in widths.items():
        if width % size:
            raise InputError(
                f"parallel.tensor_size={size} does not divide model.{name}={width}; use a divisor "
                f"of {math.gcd(*widths.values())}, which divides heads and hidden units"
            )


def check_batch_size(config: Config, *, num_ranks: int) -> None:
    """Check the batch size's policies against the ranks and what is measured.

    Args:
        num_ranks: all ranks, tensor-parallel ones included.
    """
    try:
        check_policies(config, num_ranks=config.parallel.num_data_ranks(num_ranks))
    except InputError as error:
        if config.parallel.tensor_size == 1:
            raise
        raise InputError(
            f"{error}; counted are data-parallel ranks, {num_ranks} ranks by parallel.tensor_size="
            f"{config.parallel.tensor_size}"
        ) from None


def check_policies(config: Config, *, num_ranks: int) -> None:
    """Check the policies against the data-parallel ranks and what is measured."""
    measured = config.noise_scale
    for prefix, policy in config.batch_size.policies:
        if policy.reads is not None:
            geometry, estimate = policy.reads
            for name, value, all_measured in (
                ("geometries", geometry, measured.geometries),
                ("estimates", estimate, measured.estimates),
            ):
                if value not in all_measured:
                    raise InputError(
                        f"{prefix}.policy={policy.policy} reads the {geometry} {estimate} noise "
                        f"scale, but noise_scale.{name}=[{','.join(all_measured)}] does not "
                        f"measure it; use noise_scale.{name}=[{','.join([*all_measured, value])}]"
                    )
        sizes = config.feasible_sizes(policy, num_ranks=num_ranks)
        sizes.require(config.batch_size.initial, "batch_size.initial")
        for name, size in policy.whole_sizes:
            sizes.require(size, f"{prefix}.{name}")


def check_data(config: Config, *, data_vocab_size: int, validation_sequences: int) -> None:
    """Check settings against the data."""
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < data_vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size} is smaller than the {data_vocab_size} token ids of "
            f"data.path={config.data.path}; use model.vocab_size={data_vocab_size} or null"
        )
    if config.evaluation.num_sequences > validation_sequences:
        raise InputError(
            f"evaluation.num_sequences={config.evaluation.num_sequences} is more than the "
            f"{validation_sequences} validation sequences of data.sequence_length="
            f"{config.data.sequence_length} in data.path={config.data.path}; use at most "
            f"{validation_sequences}"
        )


def check_memory(
    config: Config, *, data_vocab_size: int, num_ranks: int, ranks_per_node: int, device: str
) -> None:
    """Refuse a model or a micro-batch that cannot fit, before anything is built or written.

    Counted is what every run holds at least: float32 weights and gradients, sharded or not, whole
    weights while they are initialized, the token ids of a micro-batch and two bytes for each number
    that goes into a block, or into one block where activations are recomputed.
    """
    model = config.model.of_data(data_vocab_size)
    parameters = count_parameters(model).total
    kind = config.parallel.resolved_kind(num_ranks)
    tensor_size = config.parallel.tensor_size
    shards = 1 if kind in ("single", "ddp") else num_ranks
    if kind == "hsdp":
        shards = tensor_size * shard_group_size(
            config.parallel, num_ranks=num_ranks, ranks_per_node=ranks_per_node
        )
    weights = max(4 * parameters // tensor_size, 8 * parameters // shards)
    tokens = config.micro_batch_size * config.data.sequence_length
    blocks = 1 if model.activation_checkpointing else model.num_layers
    micro_batch = tokens * (8 + 2 * model.dim * blocks // tensor_size)
    on_gpu = device == "cuda"
    ranks = 1 if on_gpu else ranks_per_node
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_memory()
    needed = ranks * (weights + micro_batch)
    if needed > there:
        raise InputError(
            f"model.name={model.name} with {parameters:,} parameters and micro_batch_size="
            f"{config.micro_batch_size} x data.sequence_length={config.data.sequence_length} needs "
            f"at least {needed:,} bytes on {counted(ranks, 'rank')}, but the "
            f"{'GPU' if on_gpu else 'machine'} has {there:,}; use a smaller model or micro-batch, "
            "or shard over more ranks"
        )
    copies = ranks_per_node * 4 * parameters // shards  # at least: of the weights
    there, held = machine_memory(), 0 if on_gpu else needed
    if config.checkpoint.asynchronous and held + copies > there:
        raise InputError(
            f"checkpoint.asynchronous=true copies at least {copies:,} bytes to the memory of the "
            f"machine, {there:,}, beside {held:,} of the run; use checkpoint.asynchronous=false"
        )
