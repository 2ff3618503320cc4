"""SGD, with momentum and normalised: the rules of the Euclidean geometry."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gns_pretrain.model.parametrization import StepSize
from gns_pretrain.optim.base import (
    Beta,
    Group,
    OptimizerSettings,
    Rule,
    check_nesterov,
    descend,
    gradients_of,
    summed_momentum,
)
from gns_pretrain.parallel.collectives import global_norm
from gns_pretrain.parallel.sharding import local_shards


@dataclass
class SGDSettings(OptimizerSettings):
    """SGD, with momentum and normalised."""

    name: str = "sgd"
    momentum: Beta = 0.0  # m = beta m + g; 0 keeps no state
    nesterov: bool = False  # step along g + beta m instead of m
    normalize: bool = False  # divide the step by its norm over all parameters

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self.nesterov, self.momentum, self.section)

    def build(self, model: nn.Module) -> "SGD":
        """Build SGD over all trainable parameters."""
        return SGD(
            self.parameter_groups(model),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            normalize=self.normalize,
        )


class SGD(Rule):
    """Steepest descent in the Euclidean geometry, with decoupled weight decay.

        m = beta m + g;  d = g + beta m (Nesterov) or m
        w = (1 - lr * weight_decay) w - lr d            or  - lr d / ||d||_2, normalised

    With half-lives kept, g is multiplied by `momentum_gain`, so that the sum keeps its length.
    ||d||_2 runs over all parameters together, so the normalised step is the geometry's own unit
    direction (arXiv:2602.03001, Eq. 2) and its length is lr; a gradient of zero moves nothing.

    Args:
        params, lr, momentum, weight_decay: as in `Rule`.
        nesterov: step along g + beta m instead of m.
        normalize: divide the step by its norm over all parameters, which sums over ranks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        normalize: bool = False,
    ) -> None:
        check_nesterov(nesterov, momentum)
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.nesterov = nesterov
        self.normalize = normalize
        self.step_size = None if normalize else StepSize.GRADIENT

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along the momentum of each group."""
        directions = [self._directions(group, parameters) for group, parameters in trained]
        length: float | Tensor = 1.0
        if self.normalize:
            norm = global_norm([d for of_group in directions for d in of_group])
            length = torch.where(norm > 0, 1.0 / norm, 0.0)
        for (group, parameters), of_group in zip(trained, directions, strict=True):
            descend(
                parameters,
                local_shards(of_group),
                lr=group["lr"] * length,
                shrink=1 - group["lr"] * group["weight_decay"],
            )

    def _directions(self, group: Group, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Update the momentum; return d, sharded like the parameters."""
        gradients = gradients_of(parameters)
        if group["momentum"] == 0:
            return gradients
        momenta = self.momenta(parameters)
        return summed_momentum(gradients, momenta, group, nesterov=self.nesterov)
