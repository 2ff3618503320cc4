"""Subset-Norm with Subspace-Momentum: an adaptive rule with little state (arXiv:2411.07120)."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import ParamsT

from gns_pretrain.fields import at_least, checked, positive, within
from gns_pretrain.model.parametrization import StepSize
from gns_pretrain.model.roles import matrix_shape
from gns_pretrain.optim.adamw import AdamWPart, with_adamw
from gns_pretrain.optim.base import Beta, Group, OptimizerSettings, Rule, descend, gradients_of
from gns_pretrain.optim.combined import CombinedOptimizer, split_parameters
from gns_pretrain.parallel.collectives import summed
from gns_pretrain.parallel.sharding import MatrixShards, local_shards, placement_dim, shard_groups

RankShare = Annotated[float, within(0, 1, exclusive=True, hint="0.25 is usual")]
RefreshEvery = Annotated[int, at_least(1, "step", hint="200 is usual")]
Epsilon = Annotated[float, positive(hint="1e-8 is usual")]

ITERATIONS = 2  # of the subspace, each from the last one


@dataclass
class SubsetNormSettings(OptimizerSettings):
    """Subset-Norm with Subspace-Momentum for the block weights, with AdamW for the rest."""

    name: str = "subset_norm"
    momentum: Beta = 0.9  # within the subspace, an average; 0 keeps none
    beta2: Beta = 0.95  # of the rows' squared norms
    rank_share: RankShare = 0.25  # of a matrix's smaller side: the subspace's dimension
    refresh_every: RefreshEvery = 200  # steps with one subspace
    epsilon: Epsilon = 1e-8
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for embedding, output and norms

    def build(self, model: nn.Module) -> CombinedOptimizer:
        """Build the rule over the block matrices, and AdamW over the rest."""
        matrices, others = split_parameters(model)
        rule = SubsetNorm(
            matrices,
            self.lr,
            momentum=self.momentum,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            rank_share=self.rank_share,
            refresh_every=self.refresh_every,
            epsilon=self.epsilon,
        )
        return with_adamw(rule, others, self.adamw, decay_matrices_only=self.decay_matrices_only)


class SubsetNorm(Rule):
    """Momentum in a subspace, over the norms of a gradient's rows (arXiv:2411.07120).

        v = beta2 v + (1 - beta2) rowwise ||G||_2^2                          [m, 1]
        M = beta M + (1 - beta) G P                                          [m, r]
        U = M P^T + G - G P P^T
        W = (1 - lr * weight_decay) W - lr U / (v^(1/2) + epsilon)

    of a weight's matrix view [m, n] = [shape[0], rest], with r = rank_share min(m, n). P [n, r]
    spans the gradient's leading right singular vectors, nearly so by two steps of subspace
    iteration in float64; every refresh_every steps it is found anew, and M begins at zero. Both
    averages are divided by the weight that they have been given since they began.

    The subsets are rows, because FSDP2 shards rows: a step then needs no communication, and v and M
    are sharded like their weight. (The paper's are columns where n > m.) P is on every rank; new
    ones take two all-reduces of its size. State: 4 (m r + m + n r) bytes a matrix in float32,
    against AdamW's 8 m n.

    Args:
        params, lr, momentum, weight_decay: as in `Rule`; of at least 2 dimensions each
            (`split_parameters`). Row norms are n^(1/2) times AdamW's, so lr is about 10 times
            larger than AdamW's. momentum is beta, and with 0 there is neither M nor P.
        beta2: of v.
        rank_share: in (0, 1).
        refresh_every: steps.
        epsilon: positive.

    Raises:
        InputError: as in `Rule`; or a parameter that is no matrix, or is sharded along a dimension
            that its matrix view merges with another.
    """

    takes_matrices = True
    step_size = StepSize.ROOT_WIDTH  # rows of length 1

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        beta2: Beta = 0.95,
        weight_decay: float = 0.0,
        rank_share: RankShare = 0.25,
        refresh_every: RefreshEvery = 200,
        epsilon: Epsilon = 1e-8,
    ) -> None:
        self.rank_share = rank_share
        self.refresh_every = refresh_every
        self.epsilon = epsilon
        # `betas` is what half-lives in tokens look for.
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, betas=(beta2,)
        )

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        for parameter in group["params"]:
            MatrixShards.of_weight(parameter)

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along each matrix's direction; all ranks together."""
        for group, matrices in trained:
            gradients = local_shards(gradients_of(matrices))
            directions = [
                self._direction(group, matrix, gradient.flatten(1)).view(gradient.shape)
                for matrix, gradient in zip(matrices, gradients, strict=True)
            ]
            shrink = 1 - group["lr"] * group["weight_decay"]
            descend(matrices, directions, lr=group["lr"], shrink=shrink)

    def _direction(self, group: Group, matrix: nn.Parameter, gradient: Tensor) -> Tensor:
        """Update the state; return this rank's part of U / (v^(1/2) + epsilon), [rows, columns]."""
        state, (beta2,) = self.state[matrix], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["row_squares"] = zeros_by_row(matrix, 1)
        state["step"] += 1
        step = int(state["step"].item())
        across = shard_groups(matrix, along=slice(1, None))
        (row_squares,) = local_shards([state["row_squares"]])
        row_squares.lerp_(summed(gradient.square().sum(1, keepdim=True), across), 1 - beta2)
        update = gradient
        if group["momentum"]:
            update = gradient + self._correction(group["momentum"], matrix, gradient, step)
        return update / (row_squares / (1 - beta2**step)).sqrt().add(self.epsilon)

    def _correction(self, beta: float, matrix: nn.Parameter, gradient: Tensor, step: int) -> Tensor:
        """Update M, and P when it is due; return this rank's part of (M - G P) P^T."""
        state, columns = self.state[matrix], MatrixShards.of_weight(matrix).region[1]
        if "basis" not in state:
            num_rows, num_columns = matrix_shape(matrix)
            rank = max(1, round(self.rank_share * min(num_rows, num_columns)))
            generator = torch.Generator().manual_seed(0)
            state["basis"] = torch.randn(num_columns, rank, generator=generator).to(gradient)
            state["momentum_buffer"] = zeros_by_row(matrix, rank)
        (momentum,) = local_shards([state["momentum_buffer"]])
        age = (step - 1) % self.refresh_every
        if age == 0:
            state["basis"].copy_(leading_subspace(matrix, gradient, state["basis"]))
            momentum.zero_()
        basis = state["basis"][columns]
        inside = summed(gradient @ basis, shard_groups(matrix, along=slice(1, None)))
        momentum.lerp_(inside, 1 - beta)
        return (momentum / (1 - beta ** (age + 1)) - inside) @ basis.T


def leading_subspace(matrix: nn.Parameter, gradient: Tensor, basis: Tensor) -> Tensor:
    """Find the leading right singular vectors of a gradient, nearly so, from a guess.

    Args:
        matrix: whose the gradient is.
        gradient: G [rows, columns], this rank's part.
        basis: [n, r], the guess, whole.

    Returns:
        [n, r], float64, orthonormal columns; the same on every rank.
    """
    columns = MatrixShards.of_weight(matrix).region[1]
    across = shard_groups(matrix, along=slice(1, None))
    gradient, basis = gradient.double(), basis.double()
    for _ in range(ITERATIONS):
        product = torch.zeros_like(basis)
        product[columns] = gradient.T @ summed(gradient @ basis[columns], across)
        basis = torch.linalg.qr(summed(product, shard_groups(matrix))).Q
    return basis


def zeros_by_row(weight: Tensor, width: int) -> Tensor:
    """Return zeros [m, width] for a weight of m rows, sharded as its rows are."""
    local = local_shards([weight])[0]
    zeros = local.new_zeros(len(local), width)
    if not isinstance(weight, DTensor):
        return zeros
    placements = [
        placement if placement.is_replicate() or placement_dim(placement) == 0 else Replicate()
        for placement in weight.placements
    ]
    shape = torch.Size([len(weight), width])
    return DTensor.from_local(
        zeros, weight.device_mesh, placements, run_check=False, shape=shape, stride=(width, 1)
    )
