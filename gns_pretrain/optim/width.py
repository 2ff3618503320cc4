"""Learning rates by role and width, for any optimizer that says how long its steps are."""

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.parametrization import StepSize, learning_rate_factor
from gns_pretrain.model.roles import named_trainable, parameter_roles
from gns_pretrain.optim.base import Rule
from gns_pretrain.optim.combined import CombinedOptimizer


def scale_learning_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, width: float
) -> torch.optim.Optimizer:
    """Give each role its learning rate and weight decay (`model.parametrization`).

    Groups are split by their parameters' factors, those of factor 1 first: the learning rate that a
    record shows is the first group's.

    Args:
        optimizer: new, without state.
        model: over whose parameters it is.
        width: s, in units of the width at which learning rates are those of the groups.

    Returns:
        The optimizer, as it was where s = 1.

    Raises:
        InputError: it does not say how long its steps are.
    """
    if width == 1:
        return optimizer
    if isinstance(optimizer, CombinedOptimizer):
        parts = [scale_learning_rates(each, model, width) for each in optimizer.optimizers]
        return CombinedOptimizer(parts)
    step_size, role_of = step_size_of(optimizer), parameter_roles(model)
    roles = {id(parameter): role_of[name] for name, parameter in named_trainable(model)}
    groups = []
    for group in optimizer.param_groups:
        split: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factor = learning_rate_factor(step_size, roles[id(parameter)], width)
            split.setdefault(factor, []).append(parameter)
        groups += [
            group
            | {
                "params": split[factor],
                "lr": group["lr"] * factor,
                "weight_decay": group["weight_decay"] / factor,
            }
            for factor in sorted(split, key=lambda factor: factor != 1)
        ]
    optimizer.param_groups = groups
    return optimizer


def step_size_of(optimizer: torch.optim.Optimizer) -> StepSize:
    """Return how long an optimizer's steps are; InputError if it does not say."""
    if isinstance(optimizer, torch.optim.AdamW):
        return StepSize.COORDINATE
    if isinstance(optimizer, Rule) and optimizer.step_size is not None:
        return optimizer.step_size
    raise InputError(
        f"model.parametrization=mup has no learning rates for {type(optimizer).__name__} with "
        "these settings; use optimizer=adamw, signsgd, signum, sgd, muon or specsgd, or "
        "model.parametrization=standard"
    )
