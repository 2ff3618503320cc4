"""What the tap has gathered of a step's samples, brought to the ranks that look at it.

Rows stay where they are; whole matrices come to their owners. The mean gradient is the optimizer's
own, read after the last backward pass and before clipping.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gns_pretrain.distributed.gradient_tap import GradientTap
from gns_pretrain.distributed.matrix_exchange import MatrixExchange
from gns_pretrain.noise_scale.sums import SampleSums


def sample_sums(tap: GradientTap) -> SampleSums:
    """What the samples left on this rank, after the last one and before clipping; all together."""
    if tap.layout.replica_group is not None:
        for rows in (*tap.squares, *tap.signed_sums):
            dist.all_reduce(rows, group=tap.layout.replica_group)
    # Equal shard groups hold equal rows: the first one speaks for all.
    speaks = tap.layout.replica == 0
    matrices, signed_matrices = {}, {}
    if tap.needs.grams:
        matrices = owned_means(tap)
        if tap.needs.signed_sums:
            signed_matrices = owned_matrices(tap, lambda i: tap.signed_sums[i])
    return SampleSums(
        num_even=tap.num_even,
        num_odd=tap.num_samples - tap.num_even,
        square_norms=tap.square_norms,
        means=[mean_rows(tap, i) for i in range(len(tap.weights))] if speaks else [],
        squares=tap.squares if speaks else [],
        signed=tap.signed_sums if speaks else [],
        grams={i: tap.grams.get(i, no_gram(m)) for i, m in matrices.items()},
        matrices=matrices,
        signed_matrices=signed_matrices,
    )


def owned_means(tap: GradientTap) -> dict[int, Tensor]:
    """The mean gradients of the matrices that this rank owns, by weight."""
    if isinstance(tap.weights[0].weight, DTensor):
        return owned_matrices(tap, lambda i: mean_rows(tap, i))
    # Weights that are not sharded have their whole gradient here already.
    mine = [i for i, tapped in enumerate(tap.weights) if tapped.owner == tap.world.rank]
    return {i: gradient_or_zeros(tap.weights[i].weight) for i in mine}


def owned_matrices(tap: GradientTap, rows: Callable[[int], Tensor]) -> dict[int, Tensor]:
    """The whole matrices that this rank owns, by weight, from every rank's rows.

    Args:
        tap: its weights and layout.
        rows: this rank's rows of a weight, flat, perhaps padded.
    """
    layout = tap.layout
    home = {  # replica and shard of each matrix's owner
        i: divmod(tapped.owner, layout.num_shards)
        for i, tapped in enumerate(tap.weights)
        if tapped.owner is not None
    }
    replica = [i for i, (place, _) in home.items() if place == layout.replica]
    if not replica:  # fewer matrices than replicas: none belongs to this one
        return {}
    shapes = [(tap.weights[i].shape[0], tap.weights[i].shape[1]) for i in replica]
    exchange = MatrixExchange(shapes, [home[i][1] for i in replica], layout)
    own = [layout.rows_of(layout.shard, m) for m, _ in shapes]
    shards = [
        rows(i)[: (held.stop - held.start) * n].view(-1, n)
        for i, held, (_, n) in zip(replica, own, shapes, strict=True)
    ]
    return {replica[k]: matrix for k, matrix in exchange.to_owners(shards).items()}


def mean_rows(tap: GradientTap, index: int) -> Tensor:
    """This rank's rows of a weight's mean gradient, flat; zeros if it took none."""
    return tap.layout.own_rows(gradient_or_zeros(tap.weights[index].weight)).reshape(-1)


def no_gram(matrix: Tensor) -> Tensor:
    """The Gram of a matrix that no sample reached."""
    side = min(matrix.shape)
    return matrix.new_zeros(side, side, dtype=torch.float64)


def gradient_or_zeros(weight: nn.Parameter) -> Tensor:
    """A weight's mean gradient, in its own layout; zeros if no sample reached it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
