"""Parallelizing a model, and how the rows of its weights are sharded on every layout.

Rank r of S in a shard group has rows [r c, (r + 1) c) of a weight with m rows, c = ceil(m / S);
the last ranks may have fewer rows, or none. That is FSDP2's split. Statistics of the gradient are
sharded alike on every layout, so that they meet the gradient's own shard without communication.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.mesh import World


@dataclass(frozen=True)
class ShardLayout:
    """One rank's place among shards and replicas.

    Under DDP every rank has whole gradients, and statistics of its own shard alone.
    """

    shard: int  # this rank's place in its shard group
    num_shards: int
    replica: int  # which of the equal shard groups this is
    shard_group: ProcessGroup | None  # None where one rank has all
    replica_group: ProcessGroup | None  # the ranks with the same shard; None where there is one

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh | None) -> "ShardLayout":
        """Return this rank's layout in a mesh of shards, or of (replicas, shards)."""
        if mesh is None or mesh.size() == 1:
            return cls(0, 1, 0, None, None)
        if mesh.ndim == 1:
            return cls(mesh.get_local_rank(), mesh.size(), 0, mesh.get_group(), None)
        replicas, shards = mesh.shape
        return cls(
            shard=mesh.get_local_rank(1),
            num_shards=shards,
            replica=mesh.get_local_rank(0),
            shard_group=mesh.get_group(1) if shards > 1 else None,
            replica_group=mesh.get_group(0) if replicas > 1 else None,
        )

    @classmethod
    def of_weight(cls, weight: Tensor) -> "ShardLayout":
        """Return the layout of a weight: its own mesh under FSDP2, else one rank has all."""
        return cls.of_mesh(weight.device_mesh if isinstance(weight, DTensor) else None)

    def rows_of(self, shard: int, num_rows: int) -> slice:
        """Return the rows of a weight that rank `shard` of the group has; may be empty."""
        chunk = rows_per_shard(num_rows, self.num_shards)
        start = min(shard * chunk, num_rows)
        return slice(start, min(start + chunk, num_rows))

    def local_rows(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a gradient or weight, whether it is sharded or whole."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        return tensor[self.rows_of(self.shard, tensor.shape[0])]


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local shard of each weight or gradient, a plain tensor on the same memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def rows_per_shard(num_rows: int, num_shards: int) -> int:
    """Return the number of rows of every shard but the last ones."""
    return -(-num_rows // num_shards)


def packed(tensors: list[Tensor], num_shards: int) -> Tensor:
    """Pack whole tensors [m_i, ...] of one dtype into a buffer whose row r is for shard r of S.

    Returns:
        [S, sum_i ceil(m_i / S) * rest_i], padded with zeros.
    """
    parts = []
    for tensor in tensors:
        rest = tensor.numel() // max(tensor.shape[0], 1)
        width = rows_per_shard(tensor.shape[0], num_shards) * rest
        flat = tensor.reshape(-1)
        if missing := num_shards * width - flat.numel():  # F.pad copies even where it adds nothing
            flat = F.pad(flat, (0, missing))
        parts.append(flat.view(num_shards, width))
    return torch.cat(parts, dim=1)


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
