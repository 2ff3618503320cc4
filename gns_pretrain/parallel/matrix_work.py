"""Work that needs whole matrices, shared out over ranks: each matrix is done once, by its owner.

    cut by FSDP2 or HSDP   rows -> owner -> rows: two all-to-alls a shape, within the shard group
    copied by DDP          every rank has all: the owners' results, one all-gather a shape
    one process            no exchange

Matrices of one shape go through in one batch. While a batch is worked on, the next one's rows come
in and the last one's results go out.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.parallel.collectives import start_all_gather
from gns_pretrain.parallel.shard_layout import ShardLayout

# Row shards of matrices to the ranks that own them whole, and back.
#
# Spectral quantities need a whole matrix. Each matrix has one owner in the shard group; one
# all-to-all with uneven splits carries every shard to its owner, without padding.


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


Shape = tuple[int, int]

# Of a batch. An orthogonalisation holds about five tensors of its batch's size.
_BATCH_ENTRIES = 2**26


def replica_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks among which DDP keeps copies of a model; None for any other layout."""
    return model.process_group if isinstance(model, DistributedDataParallel) else None


class CopyExchange:
    """`MatrixExchange` where every rank of a group holds the matrices whole.

    Args:
        shapes: all (m, n), the same for every matrix and on every rank.
        owners: rank in the group of each matrix's owner.
        group: its ranks.
    """

    def __init__(
        self, shapes: Sequence[Shape], owners: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        self.shape = shapes[0]
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self._of_rank = [
            [i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.num_ranks)
        ]
        self.owned = self._of_rank[dist.get_rank(group)]

    def start_to_owners(self, copies: Sequence[Tensor]) -> Callable[[], dict[int, Tensor]]:
        """The matrices that this rank owns, by index: all are here already."""
        return lambda: {i: copies[i] for i in self.owned}

    def start_to_shards(
        self, matrices: dict[int, Tensor], *, like: Tensor
    ) -> Callable[[], list[Tensor]]:
        """Start to hand every owner's results to all; to be called for them, in order."""
        slots = max(len(members) for members in self._of_rank)
        part = like.new_zeros(slots, *self.shape)
        for slot, i in enumerate(self.owned):
            part[slot] = matrices[i]
        arrived = start_all_gather(part, self.group, self.num_ranks)

        def results() -> list[Tensor]:
            parts = arrived()
            found = {
                i: parts[rank, slot]
                for rank, members in enumerate(self._of_rank)
                for slot, i in enumerate(members)
            }
            return [found[i] for i in range(len(found))]

        return results


class MatrixWork:
    """One function of whole matrices, over weights of any layout.

    Args:
        weights: 2-dimensional, as the optimizer has them, all of one layout and device; the same
            list on every rank.
        replicas: `replica_group` of their model.
    """

    def __init__(self, weights: Sequence[Tensor], replicas: dist.ProcessGroup | None) -> None:
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        layout = ShardLayout.of_weight(weights[0])
        num_ranks = dist.get_world_size(replicas) if replicas else layout.num_shards
        # The products of an orthogonalisation: min(m, n)^2 max(m, n), up to a factor.
        owners = balanced_owners([min(shape) * shape[0] * shape[1] for shape in shapes], num_ranks)
        self._groups: list[tuple[list[int], MatrixExchange | CopyExchange]] = []
        for shape in dict.fromkeys(shapes):
            members = [i for i, other in enumerate(shapes) if other == shape]
            of_members = ([shape] * len(members), [owners[i] for i in members])
            exchange = (
                CopyExchange(*of_members, replicas)
                if replicas
                else MatrixExchange(*of_members, layout)
            )
            self._groups.append((members, exchange))

    def results(
        self,
        rows_of: Callable[[list[int]], list[Tensor]],
        function: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """`function` of every matrix, a shape at a time.

        Args:
            rows_of: what this rank holds of the matrices with the given indices.
            function: [k, m, n] to [k, m, n], matrix by matrix.
            dtype: in which results travel; that of the function's own precision loses nothing.

        Yields:
            Indices of one shape, and this rank's rows of their results, in `dtype`.
        """
        returning = None
        arriving = self._start(0, rows_of)
        for position, (members, exchange) in enumerate(self._groups):
            following = self._start(position + 1, rows_of)
            rows, owned = arriving
            finished = batched(owned(), function, dtype)
            under_way = exchange.start_to_shards(finished, like=rows[0].new_empty(0, dtype=dtype))
            if returning is not None:
                yield returning[0], returning[1]()
            returning, arriving = (members, under_way), following
        if returning is not None:
            yield returning[0], returning[1]()

    def _start(
        self, position: int, rows_of: Callable[[list[int]], list[Tensor]]
    ) -> tuple[list[Tensor], Callable[[], dict[int, Tensor]]]:
        """Send the matrices of one shape on their way; nothing after the last shape."""
        if position == len(self._groups):
            return [], dict
        members, exchange = self._groups[position]
        rows = rows_of(members)
        return rows, exchange.start_to_owners(rows)


def batched(
    matrices: dict[int, Tensor], function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    """A function of matrices of one shape, in batches that bound the memory it takes."""
    results: dict[int, Tensor] = {}
    indices = list(matrices)
    size = max(1, _BATCH_ENTRIES // matrices[indices[0]].numel()) if indices else 1
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        values = function(torch.stack([matrices[i] for i in chosen])).to(dtype)
        results |= dict(zip(chosen, values.unbind(), strict=True))
    return results
