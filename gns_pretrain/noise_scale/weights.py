"""Where each weight's gradients are seen, and which rank has what of their statistics.

A weight's *part* is what this rank's samples have gradients of: all of it, or what tensor
parallelism leaves to the rank. Its *rows* lie along the dimension that FSDP2 splits, which
statistics put first; every rank keeps its own (`ShardLayout.rows_of`), so that they meet the shard
of the gradient. A matrix belongs to one rank, to which the others send theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from gns_pretrain.errors import InputError
from gns_pretrain.model.roles import (
    Labels,
    MatrixChoice,
    Role,
    blocks_of,
    matrix_shape,
    named_trainable,
    parameter_roles,
)
from gns_pretrain.parallel.matrix_ownership import MatrixExchange, neighbouring_owners
from gns_pretrain.parallel.sharding import (
    MatrixShards,
    ShardLayout,
    num_data_dims,
    placement_dim,
    region_shape,
    rows_per_shard,
)


@dataclass(frozen=True)
class TappedWeight:
    """A trainable weight, where its gradients are seen, and this rank's share of it."""

    name: str
    role: Role
    weight: nn.Parameter  # what the optimizer updates; its .grad is the mean gradient
    seen: Tensor  # what autograd reaches: the weight itself, or FSDP2's unsharded copy
    block: str  # weights of one block travel together
    layout: ShardLayout  # of the model
    shards: MatrixShards | None = None  # of the matrix view, if it has an owner
    owner: tuple[int, int] | None = None  # data-parallel rank and part that own its Gram, if any

    @property
    def part_shape(self) -> torch.Size:
        """Shape of what this rank's samples have gradients of: all of it, or its part."""
        shape = self.seen.to_local().shape if isinstance(self.seen, DTensor) else self.seen.shape
        return shape or torch.Size([1])  # a scalar is a row

    @property
    def in_parts(self) -> bool:
        """Whether tensor-parallel ranks have different parts of it."""
        seen = self.seen
        return isinstance(seen, DTensor) and not all(p.is_replicate() for p in seen.placements)

    @property
    def row_dim(self) -> int:
        """The dimension along which FSDP2 splits it; 0 where it does not."""
        if not isinstance(self.weight, DTensor):
            return 0
        of_data = self.weight.placements[: num_data_dims(self.weight, self.seen)]
        splits = [placement_dim(p) for p in of_data if not p.is_replicate()]
        return splits[0] if splits else 0

    @property
    def padded_rows(self) -> int:
        """Entries of the widest rank's rows."""
        shape = self.rows_first(self.part_on_meta()).shape
        return rows_per_shard(shape[0], self.layout.num_shards) * shape[1:].numel()

    def part_on_meta(self) -> Tensor:
        """Return a tensor of the part's shape that has no memory."""
        return torch.empty(self.part_shape, device="meta")

    def rows_first(self, part: Tensor) -> Tensor:
        """Return a view of a tensor of the part's shape whose rows come first."""
        return part.movedim(self.row_dim, 0)

    def own_rows(self, part: Tensor) -> Tensor:
        """Return this rank's rows of a tensor of the part's shape."""
        rows = self.rows_first(part)
        return rows[self.layout.rows_of(self.layout.shard, len(rows))]

    def part_of(self, gradient: Tensor) -> Tensor:
        """Return this rank's part of a sample's gradient, as autograd gave it."""
        if isinstance(gradient, DTensor):
            assert isinstance(self.seen, DTensor)
            if gradient.placements != self.seen.placements:  # parts of a sum, say
                gradient = gradient.redistribute(self.seen.device_mesh, self.seen.placements)
            gradient = gradient.to_local()
        return gradient.reshape(self.part_shape)

    def mean_gradient(self, loss_scale: float) -> Tensor:
        """Return the mean gradient in float32, in the weight's own layout; zeros if it has none."""
        gradient = torch.zeros_like(self.weight) if self.weight.grad is None else self.weight.grad
        return gradient.float() if loss_scale == 1.0 else gradient.float() / loss_scale

    def mean_rows(self, loss_scale: float) -> Tensor:
        """Return this rank's rows of the mean gradient."""
        return self.rows_in_layout(self.mean_gradient(loss_scale))

    def rows_in_layout(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that is laid out as the weight is."""
        if isinstance(tensor, DTensor):
            return self.rows_first(tensor.to_local())
        return self.own_rows(tensor.reshape(self.part_shape))

    def shard_from_rows(self, flat: Tensor) -> Tensor:
        """Return this rank's shard, in the weight's own order, from its padded rows.

        Args:
            flat: [padded_rows].
        """
        own = self.own_rows(self.part_on_meta())
        return flat[: own.numel()].view(own.shape).movedim(0, self.row_dim)


def tapped_weights(
    model: nn.Module,
    layout: ShardLayout,
    seen: dict[str, Tensor],
    owned_roles: frozenset[Role],
    matrices: MatrixChoice | None = None,
    blocks: Labels | Sequence[str] | None = None,
) -> list[TappedWeight]:
    """Return every trainable weight of a parallelized model, a block at a time.

    Weights of `owned_roles` with a matrix view have owners, balanced by the cost of a square root;
    an owner's are neighbours, so that what a block sends goes to few ranks.

    Args:
        seen: of `unsharded_weights`.

    Raises:
        InputError: no weight is trainable, or one is complex.
    """
    roles, block_of = parameter_roles(model, matrices), blocks_of(model, blocks)
    weights = [
        TappedWeight(name, roles[name], weight, seen[name], block_of[name], layout)
        for name, weight in named_trainable(model)
    ]
    order = list(dict.fromkeys(tapped.block for tapped in weights))
    weights.sort(key=lambda tapped: order.index(tapped.block))
    for tapped in weights:
        if tapped.weight.is_complex():
            raise InputError(
                f"{tapped.name} is complex, which the noise scale does not take; use real "
                "parameters, such as its torch.view_as_real"
            )
    if not weights:
        raise InputError("the model has no trainable parameter, so there is no noise to measure")
    owned = [i for i, w in enumerate(weights) if w.role in owned_roles and w.weight.ndim > 1]
    for split in (True, False):
        # A matrix that every part has whole belongs to the first of them.
        num_parts = layout.num_parts if split else 1
        chosen = [i for i in owned if weights[i].in_parts == split]
        costs = [float(min(matrix_shape(weights[i].weight))) ** 3 for i in chosen]
        owners = neighbouring_owners(costs, layout.num_data_ranks * num_parts)
        for i, owner in zip(chosen, owners, strict=True):
            weight = weights[i].weight
            # Signed sums are split like a sharded weight's rows, also where weights are whole.
            shards = (
                MatrixShards.of_weight(weight)
                if isinstance(weight, DTensor)
                else MatrixShards.of_rows(matrix_shape(weight), layout)
            )
            weights[i] = replace(weights[i], shards=shards, owner=divmod(owner, num_parts))
    return weights


def owned_means(weights: Sequence[TappedWeight], loss_scale: float) -> dict[int, Tensor]:
    """Return the mean gradients of the matrices that this rank owns, by weight; all ranks together.

    Returns:
        [rows, columns] each, float32.
    """
    gradients = {
        i: tapped.mean_gradient(loss_scale)
        for i, tapped in enumerate(weights)
        if tapped.owner is not None
    }
    local = {i: g.to_local() for i, g in gradients.items() if isinstance(g, DTensor)}
    # Weights that are not sharded have their whole gradient here already.
    whole = {
        i: gradient.reshape(matrix_shape(gradient))
        for i, gradient in gradients.items()
        if i not in local
        and weights[i].owner == (weights[i].layout.data_rank, weights[i].layout.part)
    }
    return whole | owned_matrices(weights, local)


def owned_matrices(weights: Sequence[TappedWeight], local: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the whole matrices that this rank owns, by weight; all ranks together.

    Args:
        local: by weight with an owner, this rank's shard in the weight's own order.
    """
    by_group: dict[ProcessGroup | None, list[tuple[int, MatrixShards, int]]] = {}
    for i, tapped in ((i, weights[i]) for i in local):
        assert tapped.owner is not None
        assert tapped.shards is not None
        layout, part = tapped.layout, tapped.owner[1]
        replica, shard = divmod(tapped.owner[0], layout.num_shards)
        # Fewer matrices than replicas: none belongs to some.
        if replica != layout.replica or not (tapped.in_parts or layout.part == part):
            continue
        owner = shard * layout.num_parts + part if tapped.in_parts else shard
        by_group.setdefault(tapped.shards.group, []).append((i, tapped.shards, owner))
    whole: dict[int, Tensor] = {}
    for members in by_group.values():
        exchange = MatrixExchange([m[1] for m in members], [m[2] for m in members])
        shards = [local[i].reshape(region_shape(place.region)) for i, place, _ in members]
        whole |= {members[k][0]: matrix for k, matrix in exchange.to_owners(shards).items()}
    return whole
