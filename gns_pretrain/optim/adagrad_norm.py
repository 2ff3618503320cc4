"""AdaGrad-Norm: AdaGrad with one step length for all coordinates (arXiv:1806.01811).

AdAdaGrad (arXiv:2402.11215) chooses its batch sizes by the norm test. Coordinate-wise AdaGrad is
torch's own, `optimizer=adagrad`.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gns_pretrain.fields import checked, positive
from gns_pretrain.optim.base import Group, OptimizerSettings, Rule, descend, gradients_of
from gns_pretrain.parallel.collectives import global_norm
from gns_pretrain.parallel.sharding import local_shards

InitialNorm = Annotated[float, positive(hint="1e-8 makes the first step as long as lr")]


@dataclass
class AdaGradNormSettings(OptimizerSettings):
    """AdaGrad-Norm for all parameters."""

    name: str = "adagrad_norm"
    initial_norm: InitialNorm = 1e-8  # b_0

    def build(self, model: nn.Module) -> "AdaGradNorm":
        """Build AdaGrad-Norm over all trainable parameters."""
        return AdaGradNorm(self.parameter_groups(model), lr=self.lr, initial_norm=self.initial_norm)


class AdaGradNorm(Rule):
    """SGD over the root of the squared gradient norms so far, with decoupled weight decay.

        b^2 = b^2 + ||g||_2^2
        w = (1 - lr * weight_decay) w - lr g / b

    ||g||_2 runs over all parameters together. The state is one number, b^2, beside the first
    parameter.

    Args:
        params, lr, weight_decay: as in `Rule`.
        initial_norm: b at the start.
    """

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        weight_decay: float = 0.0,
        initial_norm: InitialNorm = 1e-8,
    ) -> None:
        super().__init__(params, lr=lr, momentum=0.0, weight_decay=weight_decay)
        self.initial_norm = initial_norm

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along the gradients of all groups."""
        gradients = [gradients_of(parameters) for _, parameters in trained]
        norm = global_norm([each for of_group in gradients for each in of_group])
        length = self._square_sum(norm).add_(norm.square()).rsqrt()
        for (group, parameters), of_group in zip(trained, gradients, strict=True):
            descend(
                parameters,
                local_shards(of_group),
                lr=group["lr"] * length,
                shrink=1 - group["lr"] * group["weight_decay"],
            )

    def _square_sum(self, norm: Tensor) -> Tensor:
        """Return b^2, 0-dim; at first beside a norm."""
        state = self.state[self.param_groups[0]["params"][0]]
        if "square_sum" not in state:
            state["square_sum"] = torch.full_like(norm, self.initial_norm**2)
        return state["square_sum"]
