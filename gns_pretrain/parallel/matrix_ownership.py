"""Computing functions of whole matrices, each by the one rank that owns the matrix.

    sharded (FSDP2, HSDP,    shards -> owner -> shards: two all-to-alls a shape, within the ranks
      tensor parallel)       that have the matrix once
    replicated (DDP)         every rank has all: the owners' results, one all-gather a shape
    one process              no communication

Matrices of one shape form a batch. While a batch is computed, the next one's shards arrive and the
last one's results leave.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gns_pretrain.parallel.sharding import MatrixShards, region_shape

Shape = tuple[int, int]

# Of a batch. An orthogonalisation holds about five tensors of its batch's size.
_BATCH_ENTRIES = 2**26


def balanced_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Assign each matrix to a rank so that the ranks' total costs, such as min(m, n)^3, are close.

    The costliest first, each to the rank with the least so far (ties: the lowest rank): at most
    4/3 of the best possible makespan (Graham, 1969).
    """
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def neighbouring_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Assign matrices in their order, the first to rank 0, so that the largest total is smallest.

    Up to the cost of one matrix it is as balanced as `balanced_owners`; a rank's matrices are
    neighbours, though, and can travel together.
    """

    def owners(limit: float) -> list[int]:
        rank, load, assigned = 0, 0.0, []
        for cost in costs:
            if load + cost > limit:
                rank, load = rank + 1, 0.0
            load += cost
            assigned.append(rank)
        return assigned

    low, high = max(costs, default=0.0), sum(costs)
    for _ in range(50):
        limit = (low + high) / 2
        if owners(limit)[-1:] < [num_ranks]:
            high = limit
        else:
            low = limit
    return owners(high)


class Transfer(NamedTuple):
    """Tensors that a collective in flight writes; keeps its input alive until `wait`."""

    tensors: list[Tensor]
    work: dist.Work | None = None  # None: they are here already
    sent: Tensor | None = None

    def wait(self) -> list[Tensor]:
        """Return the tensors, complete."""
        if self.work is not None:
            self.work.wait()
        return self.tensors


class MatrixExchange:
    """Moves sharded matrices to the ranks that own them, and back: uneven splits, no padding.

    Args:
        shards: where each matrix is, all within one group; the same list on every rank of it.
        owners: rank in that group of each matrix's owner.
    """

    def __init__(self, shards: Sequence[MatrixShards], owners: Sequence[int]) -> None:
        self.shards = list(shards)
        self.group = shards[0].group
        rank = shards[0].rank
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        # Buffers are ordered by the other rank, then by matrix.
        self._by_owner = sorted(range(len(shards)), key=lambda i: (owners[i], i))
        ranks = range(len(shards[0].regions))
        self._local_shapes = [
            [region_shape(shards[i].region) for i in self._by_owner if owners[i] == other]
            for other in ranks
        ]
        self._owned_shapes = [
            [region_shape(shards[i].regions[other]) for i in self.owned] for other in ranks
        ]

    def to_owners(self, local: Sequence[Tensor]) -> dict[int, Tensor]:
        """Assemble each matrix [m_i, n_i] on its owner from all ranks' local regions.

        Returns:
            The whole matrices that this rank owns, by index.
        """
        return self.assembled(self.start_to_owners(local))

    def start_to_owners(self, local: Sequence[Tensor]) -> Transfer:
        """Start `to_owners`; `assembled` ends it."""
        if self.group is None:
            return Transfer(list(local))
        parts = [local[i] for i in self._by_owner]
        return self._all_to_all(parts, self._local_shapes, self._owned_shapes, like=local[0])

    def assembled(self, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for what `start_to_owners` sent; return the owned matrices, by index."""
        pieces = transfer.wait()
        if self.group is None:
            return dict(enumerate(pieces))
        count = len(self.owned)
        return {
            i: joined_regions(self.shards[i], pieces[k::count]) for k, i in enumerate(self.owned)
        }

    def start_to_shards(self, matrices: dict[int, Tensor], *, like: Tensor) -> Transfer:
        """Start to send the owners' matrices back; return every matrix's local region, in order.

        Args:
            matrices: the whole matrices that this rank owns, by index; none on some ranks.
            like: gives the dtype and device of all.
        """
        if self.group is None:
            return Transfer([matrices[i] for i in range(len(self.shards))])
        parts = [
            matrices[i][self.shards[i].regions[rank]]
            for rank in range(len(self.shards[0].regions))
            for i in self.owned
        ]
        transfer = self._all_to_all(parts, self._owned_shapes, self._local_shapes, like=like)
        local = dict(zip(self._by_owner, transfer.tensors, strict=True))
        return transfer._replace(tensors=[local[i] for i in range(len(self.shards))])

    def _all_to_all(
        self,
        parts: list[Tensor],
        sent_shapes: list[list[Shape]],
        received_shapes: list[list[Shape]],
        *,
        like: Tensor,
    ) -> Transfer:
        """Start to send `parts`, whose shapes are listed for each rank, and to receive others."""
        sent = torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)
        sent_sizes, sizes = (
            [sum(map(math.prod, shapes)) for shapes in by_rank]
            for by_rank in (sent_shapes, received_shapes)
        )
        received = sent.new_empty(sum(sizes))
        work = dist.all_to_all_single(
            received, sent, sizes, sent_sizes, group=self.group, async_op=True
        )
        shapes = [shape for of_rank in received_shapes for shape in of_rank]
        pieces = received.split([math.prod(shape) for shape in shapes])
        tensors = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return Transfer(tensors, work, sent)


def joined_regions(shards: MatrixShards, pieces: Sequence[Tensor]) -> Tensor:
    """Return the whole matrix from the regions of every rank of the group, in their order."""
    stops = [0, *(region[0].stop for region in shards.regions)]
    in_order = all(
        region[0].start == stop and region_shape(region)[1] == shards.shape[1]
        for region, stop in zip(shards.regions, stops, strict=False)
    )
    if in_order:
        return torch.cat(list(pieces))
    whole = pieces[0].new_empty(shards.shape)
    for region, piece in zip(shards.regions, pieces, strict=True):
        whole[region] = piece
    return whole


class ReplicaExchange:
    """`MatrixExchange` where every rank of `group` has all matrices, of one shape, whole."""

    def __init__(self, shape: Shape, owners: Sequence[int], group: dist.ProcessGroup) -> None:
        self.shape = shape
        self.owners = list(owners)
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        rank = dist.get_rank(group)
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        self._slots = [owners[:i].count(owner) for i, owner in enumerate(owners)]

    def start_to_owners(self, replicas: Sequence[Tensor]) -> Transfer:
        return Transfer([replicas[i] for i in self.owned])

    def assembled(self, transfer: Transfer) -> dict[int, Tensor]:
        return dict(zip(self.owned, transfer.wait(), strict=True))

    def start_to_shards(self, matrices: dict[int, Tensor], *, like: Tensor) -> Transfer:
        """Start to gather every owner's results on all ranks, in the list's order."""
        sent = like.new_zeros(max(self._slots) + 1, *self.shape)
        for slot, i in enumerate(self.owned):
            sent[slot] = matrices[i]
        received = sent.new_empty(self.num_ranks, *sent.shape)
        # torch 2.13 deprecates the older name, which is the only one that 2.11 has.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(received.flatten(), sent.flatten(), group=self.group, async_op=True)
        results = [
            received[owner, slot] for owner, slot in zip(self.owners, self._slots, strict=True)
        ]
        return Transfer(results, work, sent)


class OwnerCompute:
    """Applies a function of whole matrices to weights of any layout, each on one rank.

    Args:
        weights: at least 2-dimensional, as the optimizer has them, on one device; the same list on
            every rank. What is computed on is their matrix view (`matrix_shape`).
        replicas: the ranks among which DDP replicates the model (`replica_group`), if it does.
    """

    def __init__(self, weights: Sequence[Tensor], replicas: dist.ProcessGroup | None) -> None:
        shards = [MatrixShards.of_weight(weight) for weight in weights]
        self._groups: list[tuple[list[int], MatrixExchange | ReplicaExchange]] = []
        # Of those that the same ranks share, each rank owns about as much.
        owners: dict[int, int] = {}
        for group in dict.fromkeys(shard.group for shard in shards):
            sharing = [i for i, shard in enumerate(shards) if shard.group is group]
            num_ranks = len(shards[sharing[0]].regions)
            if replicas and group is None:
                num_ranks = dist.get_world_size(replicas)
            # The matmuls of an orthogonalisation: min(m, n)^2 max(m, n), up to a factor.
            costs = [min(shards[i].shape) * math.prod(shards[i].shape) for i in sharing]
            owners |= zip(sharing, balanced_owners(costs, num_ranks), strict=True)
        for alike in dict.fromkeys((shard.shape, shard.group) for shard in shards):
            members = [i for i, shard in enumerate(shards) if (shard.shape, shard.group) == alike]
            of_members = [owners[i] for i in members]
            exchange = (
                ReplicaExchange(alike[0], of_members, replicas)
                if replicas and alike[1] is None
                else MatrixExchange([shards[i] for i in members], of_members)
            )
            self._groups.append((members, exchange))

    def map(
        self,
        function: Callable[[Tensor], Tensor],
        inputs: Callable[[list[int]], list[Tensor]],
        *,
        dtype: torch.dtype,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Compute `function` of every matrix, a shape at a time; all ranks together.

        Args:
            function: [k, m, n] to [k, m, n], matrix by matrix.
            inputs: the local shards of the matrices with the given indices, 2-dimensional.
            dtype: in which results travel; that of the function's own precision loses nothing.

        Yields:
            Indices of one shape, and the local shards of their results, in `dtype`.
        """
        members, exchange = self._groups[0]
        local = inputs(members)
        like = torch.empty(0, dtype=dtype, device=local[0].device)
        arriving = exchange.start_to_owners(local)
        leaving: tuple[list[int], Transfer] | None = None
        for position, (members, exchange) in enumerate(self._groups):
            current = arriving
            if position + 1 < len(self._groups):
                following, next_exchange = self._groups[position + 1]
                arriving = next_exchange.start_to_owners(inputs(following))
            results = in_batches(function, exchange.assembled(current), dtype)
            returning = exchange.start_to_shards(results, like=like)
            if leaving is not None:
                yield leaving[0], leaving[1].wait()
            leaving = (members, returning)
        if leaving is not None:
            yield leaving[0], leaving[1].wait()


def in_batches(
    function: Callable[[Tensor], Tensor], matrices: dict[int, Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    """Apply a function to matrices of one shape, in batches that bound the memory it takes."""
    results: dict[int, Tensor] = {}
    indices = list(matrices)
    size = max(1, _BATCH_ENTRIES // matrices[indices[0]].numel()) if indices else 1
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        values = function(torch.stack([matrices[i] for i in chosen])).to(dtype)
        results |= dict(zip(chosen, values.unbind(), strict=True))
    return results
