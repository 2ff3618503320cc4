"""AdamW, torch's own fused kernel: for all parameters, or for those that a matrix rule leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from gns_pretrain.fields import Settings, positive
from gns_pretrain.model.roles import Role
from gns_pretrain.optim.base import (
    ALL_ROLES,
    Beta,
    Group,
    LearningRate,
    OptimizerSettings,
    WeightDecay,
    decay_groups,
)


@dataclass
class AdamWPart(Settings):
    """AdamW (arXiv:1711.05101) beside a matrix rule, for embedding, output and norms."""

    section: ClassVar[str] = "optimizer.adamw"

    lr: LearningRate = 1e-3  # peak; the schedule and the batch size scale it like the rule's own
    weight_decay: WeightDecay = 0.1  # decoupled; the paper's value
    beta1: Beta = 0.9  # of the gradient's average
    beta2: Beta = 0.95  # of the squared gradient's average
    epsilon: Annotated[float, positive(hint="1e-8 is usual")] = 1e-8  # the paper's value

    def over(self, groups: list[Group]) -> torch.optim.AdamW:
        """Build AdamW over parameter groups that bring their own weight decay."""
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.epsilon, fused=True)


@dataclass
class AdamWSettings(AdamWPart, OptimizerSettings):
    """AdamW for all parameters."""

    section: ClassVar[str] = "optimizer"

    name: str = "adamw"

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        return self.over(self.parameter_groups(model))


class Composite(torch.optim.Optimizer):
    """Freshly built optimizers over different parameters of a model, seen as one.

    Groups and state are the parts' own, in the parts' order, so that the learning rate, saving and
    loading see one optimizer over all parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Point each part at its groups and at the one state."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every part; return the value of `closure`, run first."""
        loss = torch.enable_grad()(closure)() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state of all parts."""
        super().load_state_dict(state_dict)
        self._share()


def with_adamw(
    model: nn.Module,
    rule: torch.optim.Optimizer,
    settings: AdamWPart,
    *,
    decay_matrices_only: bool,
) -> Composite:
    """Join a rule over the model's matrices with AdamW over embedding, output and norms."""
    groups = decay_groups(
        model,
        weight_decay=settings.weight_decay,
        matrices_only=decay_matrices_only,
        roles=ALL_ROLES - {Role.MATRIX},
    )
    return Composite([rule, settings.over(groups)] if groups else [rule])
