"""Rules between settings of different groups, ranks and data, checked before anything starts.

Each function raises an InputError at the first rule that is broken.
"""

import math
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch

from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, counted
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.model.roles import Role, parameter_roles
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.sample_sums import NESTED_STRIDES, Needs
from gns_pretrain.optim.averaging import AveragingSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.width import scale_learning_rates
from gns_pretrain.parallel.mesh import shard_group_size
from gns_pretrain.system.processes import machine_memory
from gns_pretrain.training.workload import Workload

# A model on which an optimizer is tried.
TINY = LlamaConfig("tiny", 2, 1, num_heads=1, num_kv_heads=1, ffn_dim=2, vocab_size=2)


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


def check_tensor_size(config: Config, *, num_ranks: int) -> None:
    """Check that tensor parallelism splits the ranks, and heads and hidden units evenly."""
    size, widths = config.parallel.tensor_size, config.model.tensor_parallel_widths
    config.parallel.num_data_ranks(num_ranks)
    if size > 1 and not widths:
        raise InputError(
            f"parallel.tensor_size={size} splits the blocks of a Llama, and model.name="
            f"{config.model.name} is none; use 1"
        )
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


class Memory(NamedTuple):
    """What a run holds and what there is, in bytes."""

    needed: int  # at least, on a GPU or by all ranks of a machine
    there: int  # of that GPU or machine
    checkpoint: int  # weights and optimizer state


def check_memory(
    config: Config, workload: Workload, *, num_ranks: int, ranks_per_node: int, device: str
) -> Memory:
    """Refuse a model or a micro-batch that cannot fit, before anything is built or written.

    Counted is what every run holds at least, so that nothing that fits is refused: weights and the
    optimizer's state, sharded or not, and beside them, when a backward pass begins, a
    micro-batch, and when it ends, float32 gradients and a measurement's sums. While they are
    initialized, weights are whole.
    """
    size = workload.size()
    parameters, matrices = size.parameters, size.matrices
    of_matrix, of_other = state_bytes(config.optimizer, config.averaging)
    state = of_matrix * matrices + of_other * (parameters - matrices)
    kind = config.parallel.resolved_kind(num_ranks)
    tensor_size = config.parallel.tensor_size
    shards = 1 if kind in ("single", "ddp") else num_ranks
    if kind == "hsdp":
        shards = tensor_size * shard_group_size(
            config.parallel, num_ranks=num_ranks, ranks_per_node=ranks_per_node
        )
    on_gpu = device == "cuda"
    ranks = 1 if on_gpu else ranks_per_node
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_memory()
    gradients = 4 * parameters // shards + measurement_bytes(config, workload) // num_ranks
    held = (4 * parameters + state) // shards
    needed = ranks * max(4 * parameters // tensor_size, held + max(size.micro_batch, gradients))
    if needed > there:
        raise InputError(
            f"model.name={config.model.name} with {parameters:,} parameters, optimizer="
            f"{config.optimizer.name} and micro_batch_size={config.micro_batch_size} x "
            f"{size.sample} needs at least {needed:,} bytes "
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


def check_noise_scale(config: Config) -> None:
    """Check that the optimizer has what is measured of it, on a tiny model after a step."""
    if not config.noise_scale.reads_optimizer:
        return
    with torch.random.fork_rng(devices=[]):
        model = Llama(TINY)
        optimizer = after_a_step(config.averaging.build(config.optimizer, model), model)
        NoiseMeter(model, config.noise_scale, optimizer=optimizer)


def state_bytes(settings: OptimizerSettings, averaging: AveragingSettings) -> tuple[int, int]:
    """Bytes of an optimizer's state for a number in a block's matrix, and for any other, at least.

    They are what is left of a step over a tiny model: tensors of a parameter's own shape.
    """
    with torch.random.fork_rng(devices=[]):
        model = Llama(TINY)
        optimizer = after_a_step(averaging.build(settings, model), model)
    held: dict[bool, list[int]] = {True: [], False: []}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {}).values()
        same = (s for s in states if isinstance(s, torch.Tensor) and s.shape == parameter.shape)
        held[roles[name] is Role.MATRIX].append(sum(tensor.element_size() for tensor in same))
    return min(held[True]), min(held[False])


def after_a_step(optimizer: torch.optim.Optimizer, model: Llama) -> torch.optim.Optimizer:
    """Let an optimizer take a step with gradients of zero, after which it has its state."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def check_parametrization(config: Config) -> None:
    """Check that the optimizer has learning rates for the model's width."""
    width = config.model.relative_width
    if width == 1:
        return
    model = Llama(TINY)
    scale_learning_rates(config.optimizer.build(model), model, width)
    if isinstance(config.optimizer, SGDSettings) and config.gradient_clip is not None:
        raise InputError(
            f"gradient_clip={config.gradient_clip} shortens SGD's steps more the wider the model "
            "is, under model.parametrization=mup; use gradient_clip=null"
        )


def measurement_bytes(config: Config, workload: Workload) -> int:
    """Bytes that a measurement adds over all ranks, at least; 0 where the run is over before one
    with an optimizer's state.
    """
    measured, size = config.noise_scale, workload.size()
    if workload.total_samples // config.batch_size.initial <= measured.every_steps:
        return 0
    needs = reduce(or_, (GEOMETRIES[n](measured).needs for n in measured.geometries), Needs())
    needs |= measured.needs
    # float32, of every coordinate
    sums = needs.squares + needs.signed_sums + len(NESTED_STRIDES) * needs.nested_sums
    return 4 * sums * size.parameters + (size.grams if needs.matrices else 0)
