"""AdaGO: Muon's direction with a step length by AdaGrad (arXiv:2509.02981)."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gns_pretrain.fields import checked, positive, within
from gns_pretrain.optim.base import Beta, Group, gradients_of
from gns_pretrain.optim.spectral import Muon, SpectralSettings
from gns_pretrain.parallel.collectives import sharded_norms
from gns_pretrain.parallel.sharding import local_shards

NormLimit = Annotated[float, positive(hint="1.0 is usual")]
Floor = Annotated[float, within(0, 1, hint="0.01 is usual, 0 for none")]
InitialNorm = Annotated[float, positive(hint="1e-8 makes the first step as long as lr")]


@dataclass
class AdaGOSettings(SpectralSettings):
    """AdaGO for the block weights, with AdamW for the rest."""

    name: str = "adago"
    momentum: Beta = 0.95
    norm_limit: NormLimit = 1.0  # gamma, of a matrix's gradient norm
    floor: Floor = 0.01  # epsilon / lr: the least share of lr that a step takes; ours
    initial_norm: InitialNorm = 1e-8  # v_0

    def rule(self, matrices: list[Group], **options: Any) -> "AdaGO":
        return AdaGO(
            matrices,
            norm_limit=self.norm_limit,
            floor=self.floor,
            initial_norm=self.initial_norm,
            **options,
        )


class AdaGO(Muon):
    """Matrix sign of the momentum, over the root of the squared gradient norms so far.

        m = beta m + g;  u = m (or g + beta m, Nesterov)
        v^2 = v^2 + min(||g||_F, gamma)^2
        a = max(epsilon, lr min(||g||_F, gamma) / v),  epsilon = floor * lr
        w = (1 - a * weight_decay) w - a * scaling(rows, columns) * sign(u)

    Each matrix has its own v, one number beside the momentum. The paper's m is an average, of the
    same sign; its epsilon is a constant, and here follows the schedule as lr does. Weight decay
    takes the step's own length, so that it does not outgrow steps that shorten.

    Args:
        params, lr, momentum, nesterov, weight_decay and others: as in `Muon`. Steps shorten as
            1 / step^(1/2), so lr is larger than Muon's.
        norm_limit: gamma.
        floor: epsilon / lr, in [0, 1).
        initial_norm: v at the start.
    """

    has_fixed_steps = False

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.5,
        *,
        norm_limit: NormLimit = 1.0,
        floor: Floor = 0.01,
        initial_norm: InitialNorm = 1e-8,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, nesterov=nesterov, **options)
        self.norm_limit = norm_limit
        self.floor = floor
        self.initial_norm = initial_norm

    def step_along(
        self, group: Group, matrices: list[nn.Parameter], signs: list[Tensor], *, scaling: float
    ) -> None:
        """Update v^2 of each matrix, and step a along its sign."""
        norms = sharded_norms(gradients_of(matrices)).clamp_max(self.norm_limit)  # [k]
        sums = [self._square_sum(matrix, norms[0]) for matrix in matrices]
        torch._foreach_add_(sums, list(norms.square()))
        lengths = group["lr"] * (norms / torch.stack(sums).sqrt()).clamp_min(self.floor)
        weights = local_shards(matrices)
        torch._foreach_mul_(weights, list(1 - lengths * group["weight_decay"]))
        torch._foreach_sub_(weights, torch._foreach_mul(signs, list(lengths * scaling)))

    def _square_sum(self, matrix: nn.Parameter, norm: Tensor) -> Tensor:
        """Return v^2 of a matrix, 0-dim; at first beside a norm, in float32."""
        state = self.state[matrix]
        if "square_sum" not in state:
            initial = self.initial_norm**2
            state["square_sum"] = torch.full_like(norm, initial, dtype=torch.float32)
        return state["square_sum"]
