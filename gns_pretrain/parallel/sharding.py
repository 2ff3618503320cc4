"""Parallelizing a plain Llama: one process, DDP, FSDP2 or HSDP; the model knows of none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.mesh import World


def parallelize(model: Llama, world: World, *, compute_dtype: torch.dtype) -> nn.Module:
    """Parallelize the model over the ranks of `world`.

    Weights, their gradients' reduction and the optimizer's state stay float32 on every layout;
    `compute_dtype`, float32 or bfloat16, is that of the copies that forward and backward use.

    Args:
        model: on the world's device, float32, with the same values on every rank.
    """
    model.compute_dtype = compute_dtype
    if world.kind == "single":
        return model
    if world.kind == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # The rotary tables travel as inputs of each block and must stay float32.
        cast_forward_inputs=False,
    )
    for block in model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=precision)
    # Embedding, last norm and output stay in the root's group: a tied weight has two uses.
    fully_shard(model, mesh=world.mesh, mp_policy=precision)
    return model


def unwrapped(model: nn.Module) -> Llama:
    """Return the Llama inside, whose parameter names have no wrapper's prefix."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, Llama)
    return inner


@contextmanager
def gradient_synchronisation(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Set whether backward passes in this block reduce gradients over ranks or only accumulate."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield
