"""What every optimizer's settings share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gns_pretrain.errors import InputError


@dataclass
class OptimizerSettings:
    """Base of each rule's own settings."""

    name: str = "???"
    lr: float = 1e-3  # peak, before the schedule and the batch's multiplier
    weight_decay: float = 0.1  # decoupled; the paper's value
    decay_matrices_only: bool = True  # norms' weights are not decayed
    tie_to_tokens: bool = False  # averages and decay keep their half-life in tokens as B changes

    def __post_init__(self) -> None:
        """Check what all rules share."""
        check_rates("optimizer", lr=self.lr, weight_decay=self.weight_decay)


def check_rates(prefix: str, *, lr: float, weight_decay: float) -> None:
    """Refuse a learning rate or a weight decay that is negative or not finite, and a rate of 0."""
    if not 0.0 < lr < math.inf:
        raise InputError(f"{prefix}.lr={lr} must be positive and finite; 1e-3 is a usual peak")
    if not 0.0 <= weight_decay < math.inf:
        raise InputError(
            f"{prefix}.weight_decay={weight_decay} must be finite and at least 0; 0.1 is usual"
        )


def check_nesterov(nesterov: bool, *, momentum: float, usual: float) -> None:
    """Refuse to look ahead along no momentum."""
    if nesterov and momentum == 0:
        raise InputError(
            "optimizer.nesterov=true looks ahead along the momentum, and optimizer.momentum=0; "
            f"use a momentum such as {usual}, or optimizer.nesterov=false"
        )


def check_averages(prefix: str, **values: float) -> None:
    """Refuse a coefficient of a running average that is not in [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise InputError(
                f"{prefix}.{name}={value} must be at least 0 and below 1; 0.9 is usual"
            )


def check_choice(setting: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of the known ones."""
    if value not in choices:
        raise InputError(f"{setting}={value} is not known; use one of {', '.join(choices)}")
