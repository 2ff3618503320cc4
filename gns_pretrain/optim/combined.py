"""One optimizer made of several: a matrix rule for the matrices, AdamW for the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.roles import (
    MatrixChoice,
    Role,
    named_trainable,
    parameter_roles,
    transposed_weights,
)
from gns_pretrain.optim.base import Group


def split_parameters(
    model: nn.Module, matrices: MatrixChoice | None = None
) -> tuple[list[Group], list[nn.Parameter]]:
    """Split the trainable parameters into matrices, for Muon or SpecSGD, and the rest, for AdamW.

        matrices, others = split_parameters(model)
        optimizer = CombinedOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)])

    Args:
        model: plain, or parallelized by DDP, FSDP2 or parallelize_module.
        matrices: which parameters are matrices; by default those of 2 dimensions or more inside
            the model, without embeddings and the head (`parameter_roles`).

    Returns:
        Parameter groups of matrices, and a list of the other parameters, both in the model's order.
        Weights that are stored as [in, out], as GPT-2's Conv1D are, form a group of their own with
        `transposed=True`.

    Raises:
        InputError: the model has no matrices, or `matrices` names what is none.
    """
    role_of = parameter_roles(model, matrices)
    transposed = transposed_weights(model)
    plain: list[nn.Parameter] = []
    swapped: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named_trainable(model):
        is_matrix = role_of[name] is Role.MATRIX
        chosen = (swapped if name in transposed else plain) if is_matrix else others
        chosen.append(parameter)
    if not plain and not swapped:
        raise InputError("the model has no trainable matrices; choose some with `matrices`")
    groups: list[Group] = [{"params": plain}, {"params": swapped, "transposed": True}]
    return [group for group in groups if group["params"]], others


def rules_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the class names of an optimizer, or of those within: they say what its state means.

    Signum's momentum is an average and SGD's a sum, under one name.
    """
    if isinstance(optimizer, CombinedOptimizer):
        return optimizer.rules()
    return [type(optimizer).__name__]


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers over different parameters of a model, seen as one.

        optimizer = CombinedOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

    Its groups and its state are those of the optimizers, in their order. So learning rate
    schedulers, `state_dict`, `load_state_dict`, torch.distributed.checkpoint's `get_state_dict` and
    `set_state_dict`, and torch.amp.GradScaler take it as one optimizer over all parameters; use
    them on it, and no longer on the optimizers within.

    Args:
        optimizers: whose parameters are distinct; all on every rank.

    Raises:
        ValueError: a parameter is in two of them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = list(optimizers)
        for each in optimizers:
            self.state.update(each.state)
        self._share()

    def _share(self) -> None:
        """Point each optimizer at its groups and at the one state."""
        start = 0
        for each in self.optimizers:
            stop = start + len(each.param_groups)
            each.param_groups = self.param_groups[start:stop]
            each.state = self.state
            if isinstance(each, CombinedOptimizer):
                each._share()
            start = stop

    def rules(self) -> list[str]:
        """Return the class names of the optimizers within."""
        return [rule for each in self.optimizers for rule in rules_of(each)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of each optimizer; return the value of `closure`, run first."""
        loss = torch.enable_grad()(closure)() if closure else None
        for each in self.optimizers:
            each.step()
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Refuse a group that comes later, because nothing says whose it is."""
        if self.optimizers:
            raise InputError(
                "CombinedOptimizer takes no further parameter groups; give them to one of its "
                "optimizers before these are combined"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state of all optimizers."""
        super().load_state_dict(state_dict)
        self._share()
