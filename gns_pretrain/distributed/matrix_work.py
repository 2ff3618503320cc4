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

from gns_pretrain.distributed.collectives import start_all_gather
from gns_pretrain.distributed.matrix_exchange import MatrixExchange, balanced_owners
from gns_pretrain.distributed.shard_layout import ShardLayout

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
