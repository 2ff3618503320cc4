"""How the rows of every weight lie over ranks: as FSDP2 cuts them, and the same cut elsewhere.

Rank r of S in a shard group has rows [r c, (r + 1) c) of a weight with m rows, c = ceil(m / S);
the last ranks may have fewer rows, or none. Statistics of the gradient follow the same cut on every
layout, so that they meet the gradient's own shard without any exchange.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from gns_pretrain.parallel.mesh import World


@dataclass(frozen=True)
class ShardLayout:
    """One rank's place among shards and replicas.

    Under DDP every rank has all of a gradient, but keeps statistics of its own rows alone.
    """

    shard: int  # this rank's place in its shard group
    num_shards: int
    replica: int  # which of the equal shard groups this is
    num_replicas: int
    shard_group: ProcessGroup | None  # None where one rank has all
    replica_group: ProcessGroup | None  # the ranks with the same shard; None where there is one

    @classmethod
    def of(cls, world: World) -> "ShardLayout":
        """The layout of this rank in its world."""
        if world.mesh is None or world.num_ranks == 1:
            return cls(0, 1, 0, 1, None, None)
        if world.kind == "hsdp":
            replicas, shards = world.mesh.shape
            return cls(
                shard=world.mesh.get_local_rank("shard"),
                num_shards=shards,
                replica=world.mesh.get_local_rank("replica"),
                num_replicas=replicas,
                shard_group=world.mesh.get_group("shard") if shards > 1 else None,
                replica_group=world.mesh.get_group("replica") if replicas > 1 else None,
            )
        return cls(world.rank, world.num_ranks, 0, 1, world.mesh.get_group(), None)

    @classmethod
    def of_weight(cls, weight: Tensor) -> "ShardLayout":
        """The layout of a weight: its own mesh if FSDP2 has cut it, else one rank has all."""
        if not isinstance(weight, DTensor):
            return cls(0, 1, 0, 1, None, None)
        mesh = weight.device_mesh
        kind = "hsdp" if mesh.ndim == 2 else "fsdp"
        device = torch.device(mesh.device_type)
        return cls.of(World(mesh.get_rank(), mesh.size(), device, kind, mesh))

    def rows_of(self, shard: int, num_rows: int) -> slice:
        """Rows of a weight that rank `shard` of the group has; may be empty."""
        chunk = rows_per_shard(num_rows, self.num_shards)
        start = min(shard * chunk, num_rows)
        return slice(start, min(start + chunk, num_rows))

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a gradient or weight, whether it is sharded already or whole."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        return tensor[self.rows_of(self.shard, tensor.shape[0])]


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each weight or gradient, as plain tensors on the same memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def rows_per_shard(num_rows: int, num_shards: int) -> int:
    """Rows of every shard but the last ones."""
    return -(-num_rows // num_shards)


def packed(tensors: list[Tensor], num_shards: int) -> Tensor:
    """Whole tensors as one buffer whose row r holds what shard r gets, zeros behind the last rows.

    Args:
        tensors: [m_i, ...] each, of one dtype.
        num_shards: S.

    Returns:
        [S, sum_i ceil(m_i / S) * rest_i]
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
