"""Collectives beside the gradient's own reduction; on one process they do nothing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gns_pretrain.errors import OneLineError
from gns_pretrain.geometry.norms import norms
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import ShardLayout, local_shards, shard_groups


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum each entry over ranks, in place."""
    if world.num_ranks > 1:
        dist.all_reduce(values)
    return values


def reduce_over(
    values: Tensor, layout: ShardLayout, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce each entry over all ranks of a model's layout, in place."""
    for group in (layout.data_group, layout.tensor_group):
        if group is not None:
            dist.all_reduce(values, op=op, group=group)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Return whether any rank set its flag; through the host, so the device is not waited for."""
    if world.num_ranks == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=world.group)
    return bool(value.item())


def from_main(value: Any, world: World) -> Any:
    """Broadcast the main rank's value."""
    if world.num_ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.group, device=torch.device("cpu"))
    return box[0]


@contextmanager
def errors_of_main(world: World) -> Iterator[None]:
    """Raise, on every rank, the OneLineError of the main rank's block; no other rank's may fail."""
    problem: OneLineError | None = None
    try:
        yield
    except OneLineError as error:
        problem = error
    problem = from_main(problem, world)
    if problem is not None:
        problem.on_all_ranks = True
        raise problem


def gathered(value: Any, world: World) -> list[Any]:
    """Gather every rank's value on every rank, in the order of ranks."""
    if world.num_ranks == 1:
        return [value]
    values: list[Any] = [None] * world.num_ranks
    dist.all_gather_object(values, value, group=world.group)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks."""
    any_rank(False, world)


def clip_gradient_norm(parameters: list[torch.nn.Parameter], gradient_clip: float | None) -> Tensor:
    """Clip the gradients to a global norm, or not at all (None); return the `global_norm` before.

    Parameters without a gradient do not count.
    """
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    if gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
    return norm


def sharded_norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, sharded or not: [k], the dtype of `norms`, on every rank."""
    squares = norms(local_shards(tensors)).square()
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_groups.setdefault(shard_groups(tensor), []).append(index)
    for groups, members in by_groups.items():
        if groups:
            squares[members] = summed(squares[members], groups)
    return squares.sqrt()


def summed(values: Tensor, groups: Iterable[dist.ProcessGroup]) -> Tensor:
    """Sum each entry over the ranks of every group in turn, in place; return the tensor."""
    for group in groups:
        dist.all_reduce(values, group=group)
    return values


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, sharded or not: 0-dim, float32, the same on every rank."""
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for tensor in tensors:
        by_groups.setdefault(shard_groups(tensor), []).append(tensor)
    squares = []
    for groups, members in by_groups.items():
        squares.append(summed(norms(local_shards(members)).square().sum(), groups))
    return torch.stack(squares or [torch.zeros(())]).sum().sqrt().float()
