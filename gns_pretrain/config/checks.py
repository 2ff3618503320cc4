"""Rules between settings of different groups, ranks and data, checked before anything starts.

Each function raises an InputError at the first rule that is broken.
"""

import math
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch

from gns_pretrain.config.schema import Config
from gns_pretrain.data.mixture import Mixture
from gns_pretrain.errors import InputError, counted
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.llama import Llama
from gns_pretrain.model.roles import Role, parameter_roles
from gns_pretrain.noise_scale.geometries import GEOMETRIES, NESTED_STRIDES, Needs
from gns_pretrain.optim.base import OptimizerSettings
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


def check_data(config: Config, validation: Mixture) -> None:
    """Check settings against the data, of which the vocabulary and the validation split matter."""
    data_vocab_size = validation.vocab_size
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < data_vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size} is smaller than the {data_vocab_size} token ids of "
            f"data.path={config.data.path}; use model.vocab_size={data_vocab_size} or null"
        )
    if config.data.document_mask:
        _ = validation.document_ids  # are there
    num_sequences = config.evaluation.num_sequences
    for source, wanted in zip(validation.sources, validation.counts(num_sequences), strict=True):
        there = source.tokens.num_sequences(config.data.sequence_length)
        if wanted > there and len(validation.sources) == 1:
            raise InputError(
                f"evaluation.num_sequences={num_sequences} is more than the "
                f"{there} validation sequences of data.sequence_length="
                f"{config.data.sequence_length} in data.path={config.data.path}; use at most "
                f"{there}"
            )
        if not 1 <= wanted <= there:
            raise InputError(
                f"evaluation.num_sequences={num_sequences} takes {counted(wanted, 'sequence')} of "
                f"{source.name} by its weight in data.sources, whose validation split has "
                f"{there:,}, and it needs at least 1; use {'more' if wanted < 1 else 'fewer'}"
            )


class Memory(NamedTuple):
    """What a run holds and what there is, in bytes."""

    needed: int  # at least, on a GPU or by all ranks of a machine
    there: int  # of that GPU or machine
    checkpoint: int  # weights and optimizer state


def check_memory(
    config: Config, *, data_vocab_size: int, num_ranks: int, ranks_per_node: int, device: str
) -> Memory:
    """Refuse a model or a micro-batch that cannot fit, before anything is built or written.

    Counted is what every run holds at least, so that nothing that fits is refused: weights and the
    optimizer's state, sharded or not, and beside them, when a backward pass begins, the token ids
    of a micro-batch and two bytes for each number that goes into a block (one block where
    activations are recomputed), and when it ends, float32 gradients and a measurement's sums. While
    they are initialized, weights are whole.
    """
    model = config.model.of_data(data_vocab_size)
    counts = count_parameters(model)
    parameters = counts.total
    matrices = counts.in_blocks - 2 * model.dim * model.num_layers  # two norms a block
    of_matrix, of_other = state_bytes(config.optimizer)
    state = of_matrix * matrices + of_other * (parameters - matrices)
    kind = config.parallel.resolved_kind(num_ranks)
    tensor_size = config.parallel.tensor_size
    shards = 1 if kind in ("single", "ddp") else num_ranks
    if kind == "hsdp":
        shards = tensor_size * shard_group_size(
            config.parallel, num_ranks=num_ranks, ranks_per_node=ranks_per_node
        )
    tokens = config.micro_batch_size * config.data.sequence_length
    blocks = 1 if model.activation_checkpointing else model.num_layers
    micro_batch = tokens * (8 + 2 * model.dim * blocks // tensor_size)
    on_gpu = device == "cuda"
    ranks = 1 if on_gpu else ranks_per_node
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_memory()
    gradients = 4 * parameters // shards + measurement_bytes(config, model) // num_ranks
    held = (4 * parameters + state) // shards
    needed = ranks * max(4 * parameters // tensor_size, held + max(micro_batch, gradients))
    if needed > there:
        raise InputError(
            f"model.name={model.name} with {parameters:,} parameters, optimizer="
            f"{config.optimizer.name} and micro_batch_size={config.micro_batch_size} x "
            f"data.sequence_length={config.data.sequence_length} needs at least {needed:,} bytes "
            f"on {counted(ranks, 'rank')}, but the {'GPU' if on_gpu else 'machine'} has {there:,}; "
            "use a smaller model or micro-batch, or shard over more ranks"
        )
    copies, machine, others = ranks_per_node * held, machine_memory(), 0 if on_gpu else needed
    if config.checkpoint.asynchronous and others + copies > machine:
        raise InputError(
            f"checkpoint.asynchronous=true copies {copies:,} bytes to the memory of the machine, "
            f"{machine:,}, beside {others:,} of the run; use checkpoint.asynchronous=false"
        )
    return Memory(needed, there, checkpoint=4 * parameters + state)


def state_bytes(settings: OptimizerSettings) -> tuple[int, int]:
    """Bytes of an optimizer's state for a number in a block's matrix, and for any other, at least.

    They are what is left of a step over a tiny model: tensors of a parameter's own shape.
    """
    with torch.random.fork_rng(devices=[]):
        model = Llama(
            LlamaConfig("tiny", 2, 1, num_heads=1, num_kv_heads=1, ffn_dim=2, vocab_size=2)
        )
        optimizer = settings.build(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    held: dict[bool, list[int]] = {True: [], False: []}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {}).values()
        same = (s for s in states if isinstance(s, torch.Tensor) and s.shape == parameter.shape)
        held[roles[name] is Role.MATRIX].append(sum(tensor.element_size() for tensor in same))
    return min(held[True]), min(held[False])


def measurement_bytes(config: Config, model: LlamaConfig) -> int:
    """Bytes that a measurement adds over all ranks, at least; 0 where the run is over before one
    with an optimizer's state.

    Args:
        model: with the vocabulary's size.
    """
    measured = config.noise_scale
    step_tokens = config.batch_size.initial * config.data.sequence_length
    if config.token_budget // step_tokens <= measured.every_steps:
        return 0
    needs = reduce(or_, (GEOMETRIES[n](measured).needs for n in measured.geometries), Needs())
    needs |= measured.needs
    # float32, of every coordinate
    sums = needs.squares + needs.signed_sums + len(NESTED_STRIDES) * needs.nested_sums
    kv_dim = model.num_kv_heads * model.head_dim
    sides = [model.dim] * 2 + [kv_dim] * 2 + [min(model.dim, model.ffn_dim)] * 3
    grams = model.num_layers * sum(side**2 for side in sides) if needs.matrices else 0  # float64
    return 4 * sums * count_parameters(model).total + 8 * grams
