"""Row shards of matrices to the ranks that own them whole, and back.

Spectral quantities need a whole matrix. Each matrix has one owner in the shard group; one
all-to-all with uneven splits carries every shard to its owner, without padding.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gns_pretrain.distributed.shard_layout import ShardLayout


def balanced_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """An owner for each matrix, so that the ranks' total costs are close.

    The costliest first, each to the rank with the least so far (ties: the lowest rank): at most
    4/3 of the best possible makespan (Graham, 1969).

    Args:
        costs: of each matrix, such as min(m, n)^3.
        num_ranks: ranks to choose from.
    """
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


class MatrixExchange:
    """The exchange for one list of matrices.

    Args:
        shapes: (m_i, n_i) of each matrix, the same list on every rank of the shard group.
        owners: place in the shard group of each matrix's owner.
        layout: this rank's place.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], owners: Sequence[int], layout: ShardLayout
    ) -> None:
        self.shapes = list(shapes)
        self.owners = list(owners)
        self.layout = layout
        self.owned = [i for i, owner in enumerate(owners) if owner == layout.shard]
        by_owner = sorted(range(len(shapes)), key=lambda i: (owners[i], i))
        self._sent_order = by_owner
        self._sent = [
            sum(self._size(i, layout.shard) for i in by_owner if owners[i] == rank)
            for rank in range(layout.num_shards)
        ]
        self._received = [
            sum(self._size(i, rank) for i in self.owned) for rank in range(layout.num_shards)
        ]

    def _size(self, matrix: int, shard: int) -> int:
        """Elements of a matrix that a shard holds."""
        rows, columns = self.shapes[matrix]
        held = self.layout.rows_of(shard, rows)
        return (held.stop - held.start) * columns

    def to_owners(self, shards: Sequence[Tensor]) -> dict[int, Tensor]:
        """Bring every matrix together on its owner.

        Args:
            shards: this rank's rows of each matrix, [rows_i, n_i], one dtype and device.

        Returns:
            The whole matrices [m_i, n_i] that this rank owns, by index.
        """
        return self.start_to_owners(shards)()

    def start_to_owners(self, shards: Sequence[Tensor]) -> Callable[[], dict[int, Tensor]]:
        """`to_owners` beside other work: to be called for the matrices when they are needed."""
        if self.layout.shard_group is None:
            return lambda: dict(enumerate(shards))
        sent = torch.cat([shards[i].reshape(-1) for i in self._sent_order])
        arrived = self._start_all_to_all(sent, self._sent, self._received)
        return lambda: self._whole(arrived())

    def _whole(self, received: Tensor) -> dict[int, Tensor]:
        """Matrices from what the ranks have sent: each one's rows, in the order of ranks."""
        pieces: dict[int, list[Tensor]] = {i: [] for i in self.owned}
        offset = 0
        for rank in range(self.layout.num_shards):
            for i in self.owned:
                size = self._size(i, rank)
                pieces[i].append(received[offset : offset + size].view(-1, self.shapes[i][1]))
                offset += size
        return {i: torch.cat(pieces[i]) for i in self.owned}

    def to_shards(self, matrices: dict[int, Tensor], *, like: Tensor) -> list[Tensor]:
        """The way back: each owner's whole matrices to every rank's rows.

        Args:
            matrices: the whole matrices that this rank owns, by index; none on some ranks.
            like: gives the dtype and device of all.

        Returns:
            This rank's rows of every matrix, in the list's order.
        """
        return self.start_to_shards(matrices, like=like)()

    def start_to_shards(
        self, matrices: dict[int, Tensor], *, like: Tensor
    ) -> Callable[[], list[Tensor]]:
        """`to_shards` beside other work: to be called for the rows when they are needed."""
        if self.layout.shard_group is None:
            return lambda: [matrices[i] for i in range(len(self.shapes))]
        rows = [
            matrices[i][self.layout.rows_of(rank, self.shapes[i][0])].reshape(-1)
            for rank in range(self.layout.num_shards)
            for i in self.owned
        ]
        sent = torch.cat(rows) if rows else like.new_empty(0)
        arrived = self._start_all_to_all(sent, self._received, self._sent)
        return lambda: self._rows(arrived())

    def _rows(self, received: Tensor) -> list[Tensor]:
        """This rank's rows from what the owners have sent."""
        parts = received.split([self._size(i, self.layout.shard) for i in self._sent_order])
        shards = {
            i: part.view(-1, self.shapes[i][1])
            for i, part in zip(self._sent_order, parts, strict=True)
        }
        return [shards[i] for i in range(len(self.shapes))]

    def _start_all_to_all(
        self, sent: Tensor, sent_sizes: list[int], received_sizes: list[int]
    ) -> Callable[[], Tensor]:
        received = sent.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(
            received,
            sent,
            received_sizes,
            sent_sizes,
            group=self.layout.shard_group,
            async_op=True,
        )

        def arrived(sent: Tensor = sent) -> Tensor:  # holds the buffer until it has left
            work.wait()
            return received

        return arrived
