"""What our own update rules share: they work in place on the rows that a rank holds."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Kind, parameter_kinds
from gns_pretrain.parallel.shard_layout import local_parts
from gns_pretrain.parallel.sharding import unwrapped

# Parameter groups by what a parameter is in the model, never by its shape alone.

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


# What every optimizer's settings share.


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


# Averages and decay that keep their half-life in tokens when the batch size changes.
#
# A step of B sequences moves B / B_0 times as many tokens as one of B_0, so what forgets once a
# step has to forget that much more of it. Off by default: the paper changes the learning rate
# alone. What is called otherwise than momentum, betas and weight_decay (another library's rho,
# say) stays.

_TIED = ("momentum", "betas", "weight_decay")


def tied_average(beta: float, growth: float) -> float:
    """beta' = beta^(B / B_0): the same half-life, -B ln 2 / ln beta sequences, at any B.

    Args:
        beta: of the average at B_0, in [0, 1).
        growth: B / B_0.
    """
    return beta**growth


def tied_gain(group: dict[str, Any]) -> float:
    """What a momentum that sums its gradients, m = beta' m + gain g, multiplies them by.

        gain = (1 - beta') / (1 - beta)

    Such a sum settles at g / (1 - beta) times its gain, so the step's length stays what it was at
    B_0 and the learning rate's multiplier alone changes it. Averages need none.

    Args:
        group: of an optimizer; exactly 1 where nothing was tied.
    """
    beta = group["momentum"]
    return float((1.0 - beta) / (1.0 - group.get("tied_momentum", beta)))


def tied_weight_decay(weight_decay: float, growth: float, lr_multiplier: float) -> float:
    """Decay whose product with the learning rate grows as the batch does.

        (lr * multiplier) * decay' = lr * decay * B / B_0

    A weight shrinks by lr * decay a step, so its half-life in tokens stays, to first order in
    lr * decay. With the multiplier sqrt(B / B_0) the decay itself grows as sqrt(B / B_0).

    Args:
        weight_decay: at B_0.
        growth: B / B_0.
        lr_multiplier: what the batch size has done to the learning rate already.
    """
    return weight_decay * growth / lr_multiplier


def tie_to_tokens(optimizer: Any, batch_size: int) -> None:
    """Remember, in each group, the values that belong to the initial batch size B_0."""
    for group in optimizer.param_groups:
        group["tied_batch_size"] = batch_size
        for name in _TIED:
            if name in group:
                group[f"tied_{name}"] = group[name]


def retie(optimizer: Any, batch_size: int, *, lr_multiplier: float = 1.0) -> None:
    """Set momenta, betas and weight decays to what a batch asks for; untied groups stay.

    Args:
        optimizer: tied by `tie_to_tokens`, or not: then nothing happens.
        batch_size: B, sequences of the coming step.
        lr_multiplier: of the learning rate, from the batch size.
    """
    for group in optimizer.param_groups:
        if "tied_batch_size" not in group:
            continue
        growth = batch_size / group["tied_batch_size"]
        if "tied_momentum" in group:
            group["momentum"] = tied_average(group["tied_momentum"], growth)
        if "tied_betas" in group:
            group["betas"] = tuple(tied_average(beta, growth) for beta in group["tied_betas"])
        if "tied_weight_decay" in group:
            group["weight_decay"] = tied_weight_decay(
                group["tied_weight_decay"], growth, lr_multiplier
            )


Group = dict[str, Any]


class Rule(torch.optim.Optimizer):
    """An optimizer whose state is one momentum buffer a parameter, of the parameter's layout."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        self.update([(group, parameters) for group, parameters in trained if parameters])
        return loss

    @abstractmethod
    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Change the parameters in place; the list holds each group's that have a gradient."""

    def momenta(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Each parameter's momentum buffer, zeros at first, laid over ranks like the parameter."""
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Each parameter's gradient, laid over ranks like the parameter."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def summed_momentum(
    gradients: list[Tensor], momenta: list[Tensor], group: Group, *, nesterov: bool
) -> list[Tensor]:
    """The direction of a momentum that is a sum and not an average.

        m = beta m + gain g;  d = gain g + beta m (Nesterov) or m

    Args:
        gradients: g, whole tensors or this rank's rows.
        momenta: m, of the gradients' layout; updated in place.
        group: whose momentum beta is; the gain is 1 unless it is tied to tokens (`tied_gain`).
        nesterov: whether to look ahead.

    Returns:
        d, of the gradients' layout; without Nesterov the momenta themselves.
    """
    beta, gain = group["momentum"], tied_gain(group)
    rows = local_parts(momenta)
    torch._foreach_mul_(rows, beta)
    torch._foreach_add_(rows, local_parts(gradients), alpha=gain)
    if not nesterov:
        return momenta
    if gain != 1:
        gradients = list(torch._foreach_mul(gradients, gain))
    return list(torch._foreach_add(gradients, momenta, alpha=beta))


def descend(
    parameters: list[nn.Parameter],
    directions: list[Tensor],
    *,
    lr: float | Tensor,
    shrink: float,
) -> None:
    """w = shrink w - lr d in place, on this rank's rows.

    Args:
        parameters: w, of any layout.
        directions: d, this rank's rows of each.
        lr: of this step; a 0-dim tensor where only the device knows it.
        shrink: 1 - lr * weight_decay, the decoupled decay.
    """
    weights = local_parts(parameters)
    torch._foreach_mul_(weights, shrink)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(weights, directions, alpha=-lr)
