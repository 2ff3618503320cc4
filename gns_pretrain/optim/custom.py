"""Any other optimizer, by its class path: torch.optim.*, or one of an installed library."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.optim.adamw import AdamWPart, with_adamw
from gns_pretrain.optim.base import (
    Group,
    OptimizerSettings,
    block_matrices,
    check_choice,
    decay_groups,
)

PARAMETERS = ("all", "block_matrices")


@dataclass
class CustomSettings(OptimizerSettings):
    """Settings of an optimizer that is named by its class."""

    name: str = "custom"
    weight_decay: float = 0.0  # handed to the class, which may couple it with the gradient
    class_path: str = "???"  # such as torch.optim.NAdam
    kwargs: Any = None  # a mapping, for the class beside lr and weight decay; null: nothing
    parameters: str = "all"  # all | block_matrices, with AdamW for the rest
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for what the class does not take

    def __post_init__(self) -> None:
        """Try the class on small weights, so that a mistake shows before anything starts."""
        super().__post_init__()
        check_choice("optimizer.parameters", self.parameters, PARAMETERS)
        # Not typed as a mapping: Hydra would then refuse every name that is not there already.
        if not (self.kwargs is None or isinstance(self.kwargs, dict)):
            raise InputError(
                f"optimizer.kwargs={self.kwargs} is no mapping; write optimizer.kwargs="
                "'{momentum_decay: 0.004}'"
            )
        refuse_own_settings(self.kwargs or {})
        optimizer = tried_out(self)
        if self.tie_to_tokens and optimizer.param_groups[0].get("momentum", 0):
            raise InputError(
                "optimizer.tie_to_tokens=true must know whether a momentum is an average or a "
                f"sum, and {self.class_path} does not tell; use optimizer.tie_to_tokens=false, or "
                "optimizer=sgd_momentum, signum or muon"
            )


def refuse_own_settings(kwargs: dict[str, Any]) -> None:
    """Refuse what the parameter groups hand to the class anyway, whatever kwargs say."""
    if "params" in kwargs:
        raise InputError("optimizer.kwargs.params is what the model brings; leave it out")
    for name in ("lr", "weight_decay"):
        if name in kwargs:
            raise InputError(
                f"optimizer.kwargs.{name} is a setting of its own; "
                f"use optimizer.{name}={kwargs[name]}"
            )


def tried_out(settings: CustomSettings) -> torch.optim.Optimizer:
    """The named optimizer after one step over small weights, grouped as a model's will be.

    Raises:
        InputError: it cannot be built or cannot take the step.
    """
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    decay = settings.weight_decay
    matrices: Group = {"params": [matrix], "weight_decay": decay}
    if settings.parameters == "block_matrices":
        return after_a_step(settings, [matrices])
    groups = [matrices, {"params": [vector], "weight_decay": 0.0}]
    if not settings.decay_matrices_only:
        groups = [{"params": [matrix, vector], "weight_decay": decay}]
    try:
        return after_a_step(settings, groups)
    except InputError as problem:
        try:
            after_a_step(settings, [matrices])
        except InputError:
            raise problem from None
        raise InputError(
            f"optimizer.parameters=all hands vectors to {settings.class_path} too: "
            f"{one_line(problem.__cause__ or problem)}; use optimizer.parameters=block_matrices, "
            "with AdamW for the rest"
        ) from problem


def after_a_step(settings: CustomSettings, groups: list[Group]) -> torch.optim.Optimizer:
    """The named optimizer over some parameter groups, after a step along gradients of ones."""
    optimizer = instantiate(settings, groups)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # somebody else's class may raise anything
        raise InputError(
            f"optimizer.class_path={settings.class_path} cannot take a step: {one_line(error)}; "
            "name a class that steps along dense gradients, and on a CPU"
        ) from error
    return optimizer


def instantiate(settings: CustomSettings, groups: list[Group]) -> torch.optim.Optimizer:
    """The named optimizer over some parameter groups.

    Raises:
        InputError: there is no such class, it is no optimizer, or it refuses its arguments.
    """
    kind = optimizer_class(settings.class_path)
    try:
        optimizer = kind(groups, lr=settings.lr, **(settings.kwargs or {}))
    except Exception as error:  # somebody else's class may raise anything
        raise InputError(
            f"optimizer.kwargs={settings.kwargs} with optimizer.lr={settings.lr} is not what "
            f"{settings.class_path} takes: {one_line(error)}; see its documentation"
        ) from error
    if settings.weight_decay > 0 and "weight_decay" not in optimizer.defaults:
        raise InputError(
            f"optimizer.weight_decay={settings.weight_decay}, but {settings.class_path} has no "
            "weight decay; use optimizer.weight_decay=0"
        )
    return optimizer


def one_line(error: BaseException) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def optimizer_class(path: str) -> Callable[..., torch.optim.Optimizer]:
    """The class at a dotted path.

    Raises:
        InputError: there is none, or it is no optimizer.
    """
    module_name, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"optimizer.class_path={path} cannot be imported ({error}); use a path such as "
            "torch.optim.NAdam, and install its library first"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer.class_path={path} is no torch.optim.Optimizer; name a subclass of it"
        )
    return kind


def build_custom(model: nn.Module, settings: CustomSettings) -> torch.optim.Optimizer:
    """The named optimizer for a model that is already laid over ranks."""
    if settings.parameters == "all":
        groups = decay_groups(
            model, weight_decay=settings.weight_decay, matrices_only=settings.decay_matrices_only
        )
        return instantiate(settings, groups)
    matrices = {"params": block_matrices(model), "weight_decay": settings.weight_decay}
    return with_adamw(
        model,
        instantiate(settings, [matrices]),
        settings.adamw,
        decay_matrices_only=settings.decay_matrices_only,
    )
