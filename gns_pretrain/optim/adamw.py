"""AdamW, torch's own fused kernel: of a whole model, or of what a matrix rule leaves."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.optim.groups import decay_groups
from gns_pretrain.optim.rule import Group
from gns_pretrain.optim.settings import OptimizerSettings, check_averages, check_rates


@dataclass
class AdamWSettings(OptimizerSettings):
    """Settings of AdamW (arXiv:1711.05101)."""

    name: str = "adamw"
    beta1: float = 0.9  # of the gradient's average
    beta2: float = 0.95  # of the squared gradient's average
    epsilon: float = 1e-8  # the paper's value

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        super().__post_init__()
        check_averages("optimizer", beta1=self.beta1, beta2=self.beta2)
        check_epsilon("optimizer", self.epsilon)


@dataclass
class AdamWPart:
    """Settings of AdamW beside a matrix rule: for embedding, output and norms."""

    lr: float = 1e-3  # peak; scaled by the schedule and the batch like the rule's own
    weight_decay: float = 0.1  # decoupled; the paper's value
    beta1: float = 0.9  # of the gradient's average
    beta2: float = 0.95  # of the squared gradient's average
    epsilon: float = 1e-8  # the paper's value

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        check_rates("optimizer.adamw", lr=self.lr, weight_decay=self.weight_decay)
        check_averages("optimizer.adamw", beta1=self.beta1, beta2=self.beta2)
        check_epsilon("optimizer.adamw", self.epsilon)


def check_epsilon(prefix: str, epsilon: float) -> None:
    """Refuse an epsilon that is not positive and finite."""
    if not 0.0 < epsilon < math.inf:
        raise InputError(f"{prefix}.epsilon={epsilon} must be positive and finite; 1e-8 is usual")


def adamw_over(groups: list[Group], settings: AdamWSettings | AdamWPart) -> torch.optim.AdamW:
    """AdamW over parameter groups that bring their own weight decay."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def build_adamw(model: nn.Module, settings: AdamWSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of a model that is already laid over ranks."""
    groups = decay_groups(
        model, weight_decay=settings.weight_decay, matrices_only=settings.decay_matrices_only
    )
    return adamw_over(groups, settings)
