"""AdamW, torch's own fused kernel: of a whole model, or of what a matrix rule leaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.optim.base import (
    ALL_KINDS,
    BLOCK_MATRICES,
    Group,
    OptimizerSettings,
    check_averages,
    check_rates,
    decay_groups,
)


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


# Several rules as one optimizer: a matrix rule inside the blocks, AdamW for everything else.


class Composite(torch.optim.Optimizer):
    """Optimizers over different parameters of a model, seen as one.

    Groups and state are the parts' own, in the parts' order, so that the learning rate, saving and
    loading see one optimizer over all parameters.

    Args:
        parts: freshly built, over parameters that do not overlap.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Let each part work on its stretch of the groups and on the one state."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part.

        Args:
            closure: computes the gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
    """A rule over the block matrices, joined by AdamW over embedding, output and norms.

    Args:
        model: laid over ranks.
        rule: built over `block_matrices(model)`.
        settings: of AdamW.
        decay_matrices_only: whether the norms' weights go without decay.
    """
    groups = decay_groups(
        model,
        weight_decay=settings.weight_decay,
        matrices_only=decay_matrices_only,
        kinds=ALL_KINDS - BLOCK_MATRICES,
    )
    return Composite([rule, adamw_over(groups, settings)] if groups else [rule])
