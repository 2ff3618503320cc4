"""Collectives beside the gradient's own reduction; on one process they do nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_pretrain.parallel.mesh import World


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Average each entry over ranks, in place."""
    if world.num_ranks > 1:
        dist.all_reduce(values)
        values /= world.num_ranks
    return values


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum each entry over ranks, in place."""
    if world.num_ranks > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Return whether any rank set its flag; through the host, so the device is not waited for."""
    if world.num_ranks == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def from_main(value: Any, world: World) -> Any:
    """Broadcast the main rank's value."""
    if world.num_ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gathered(value: Any, world: World) -> list[Any]:
    """Gather every rank's value on every rank, in the order of ranks."""
    if world.num_ranks == 1:
        return [value]
    values: list[Any] = [None] * world.num_ranks
    dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks."""
    any_rank(False, world)


def reduce_scatter(
    buffer: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.Work | None]:
    """Start to sum a buffer over a group and to scatter its rows.

    Args:
        buffer: [ranks of the group, width]; must live until the work is done.
        group: None where one rank has all.

    Returns:
        This rank's row, [width], valid after waiting for the work; and the work, or None.
    """
    if group is None:
        return buffer[0], None
    row = torch.empty_like(buffer[0])
    # torch 2.13 deprecates the older name, which is the only one that 2.11 has.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return row, scatter(row, buffer.flatten(), group=group, async_op=True)


def reduce_to(owner: int, tensor: Tensor, world: World) -> dist.Work | None:
    """Start to sum a tensor onto one rank, in place; elsewhere its content is lost."""
    if world.num_ranks == 1:
        return None
    return dist.reduce(tensor, dst=owner, async_op=True)


def clip_gradient_norm(parameters: list[torch.nn.Parameter], gradient_clip: float | None) -> Tensor:
    """Clip the gradients to a global norm of `gradient_clip`; return the norm before clipping.

    Args:
        parameters: sharded or not; those without a gradient do not count.
        gradient_clip: None measures the norm and scales nothing.

    Returns:
        A 0-dim float32 tensor, the same on every rank.
    """
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    if gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
    return norm


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all coordinates of all tensors, sharded or not; the same on every rank.

    A 0-dim float32 tensor.
    """
    # A CPU adds up in the order of memory: of 16 M coordinates float32 loses 2e-4, and each layout
    # another share. GPUs add in trees.
    dtype = torch.float64 if all(t.device.type == "cpu" for t in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2.0, dtype=dtype) if tensors else [torch.zeros(())]
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
