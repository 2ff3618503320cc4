"""What our own update rules share: they work in place on the rows that a rank holds."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.distributed.shard_layout import local_parts
from gns_pretrain.optim.token_ties import tied_gain

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
