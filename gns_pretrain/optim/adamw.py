"""AdamW, torch's own fused kernel: for all parameters, or for those that a matrix rule leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn

from gns_pretrain.fields import Settings, positive
from gns_pretrain.optim.base import (
    Beta,
    Group,
    LearningRate,
    OptimizerSettings,
    WeightDecay,
    decay_groups,
)
from gns_pretrain.optim.combined import CombinedOptimizer


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


def with_adamw(
    matrix_rule: torch.optim.Optimizer,
    others: Sequence[nn.Parameter],
    settings: AdamWPart,
    *,
    decay_matrices_only: bool,
) -> CombinedOptimizer:
    """Join a rule over the model's matrices with AdamW over embedding, output and norms."""
    groups = decay_groups(
        others, weight_decay=settings.weight_decay, matrices_only=decay_matrices_only
    )
    return CombinedOptimizer([matrix_rule, settings.over(groups)] if groups else [matrix_rule])
