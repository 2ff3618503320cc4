"""Parameter groups by what a parameter is in the model, never by its shape alone."""

from collections.abc import Collection
from typing import Any

from torch import nn

from gns_pretrain.distributed.sharding import unwrapped
from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Kind, parameter_kinds

# What the matrix rules update; AdamW takes the rest.
BLOCK_MATRICES = frozenset({Kind.ATTENTION, Kind.FEED_FORWARD})
ALL_KINDS = frozenset(Kind)


def decay_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    matrices_only: bool,
    kinds: Collection[Kind] = ALL_KINDS,
) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, in the model's own order.

    Args:
        model: laid over ranks or not; frozen parameters are left out.
        weight_decay: of the first group.
        matrices_only: whether the norms' weights go to a second group without decay.
        kinds: parameters of other kinds are left out.

    Raises:
        InputError: a parameter whose kind is not known.
    """
    kind_of = parameter_kinds(unwrapped(model))
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in unwrapped(model).named_parameters():
        if not parameter.requires_grad or kind_of[name] not in kinds:
            continue
        is_plain = matrices_only and kind_of[name] is Kind.NORM
        (plain if is_plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights inside the blocks that a matrix rule updates, in the model's order.

    Raises:
        InputError: one of them is no matrix, or a parameter's kind is not known.
    """
    kind_of = parameter_kinds(unwrapped(model))
    matrices = []
    for name, parameter in unwrapped(model).named_parameters():
        if not parameter.requires_grad or kind_of[name] not in BLOCK_MATRICES:
            continue
        if parameter.ndim != 2:
            raise InputError(
                f"{name} has shape {list(parameter.shape)}, and a matrix rule updates the weights "
                "of attention and feed-forward as matrices; give it another kind in "
                "gns_pretrain/model/parameters.py, or use a rule for all parameters"
            )
        matrices.append(parameter)
    return matrices


def set_learning_rate(optimizer: Any, factor: float) -> float:
    """Set each group's learning rate to its peak times `factor`; returns the first group's.

    The peak is the rate that the group had when `remember_peaks` saw it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def remember_peaks(optimizer: Any) -> None:
    """Keep each group's peak learning rate beside the current one; both are checkpointed."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
