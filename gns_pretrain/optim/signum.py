"""Signum and signSGD: the rules of the Manhattan geometry (arXiv:2602.03001, Section 2.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.optim.base import (
    Group,
    OptimizerSettings,
    Rule,
    check_averages,
    check_choice,
    decay_groups,
    gradients_of,
)
from gns_pretrain.parallel.shard_layout import local_parts

COMPILE = ("auto", "always", "never")


@dataclass
class SignumSettings(OptimizerSettings):
    """Settings of Signum; with momentum 0 it is signSGD."""

    name: str = "signum"
    momentum: float = 0.95  # m = beta m + (1 - beta) g; the paper searches 0.7 to 0.999
    compile: str = "auto"  # one kernel over all tensors: auto (on GPUs) | always | never

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        super().__post_init__()
        check_averages("optimizer", momentum=self.momentum)
        check_choice("optimizer.compile", self.compile, COMPILE)


class Signum(Rule):
    """Steepest descent in the Manhattan geometry, with decoupled weight decay.

        m = beta m + (1 - beta) g
        w = (1 - lr * weight_decay) w - lr sign(m)

    Every coordinate goes by itself, so a rank updates its own rows and talks to nobody.

    Args:
        groups: parameter groups with their weight decay.
        lr: learning rate.
        momentum: beta; 0 is signSGD and keeps no state.
        compile: see `SignumSettings`.
    """

    def __init__(
        self, groups: list[Group], *, lr: float, momentum: float, compile: str = "auto"
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum})
        on_gpu = self.param_groups[0]["params"][0].device.type == "cuda"
        self.compiled = compile == "always" or (compile == "auto" and on_gpu)
        self._kernel: Callable[..., None] = torch.compile(sign_step) if self.compiled else sign_step

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """One step."""
        for group, parameters in trained:
            momentum = group["momentum"]
            momenta = local_parts(self.momenta(parameters)) if momentum else []
            self._run(
                held(local_parts(parameters)),
                held(local_parts(gradients_of(parameters))),
                held(momenta),
                (1 - momentum, 1 - group["lr"] * group["weight_decay"], -group["lr"]),
            )

    def _run(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        momenta: list[Tensor],
        numbers: tuple[float, float, float],
    ) -> None:
        if not weights:  # a rank may hold no row of a small group
            return
        values: Sequence[Any] = numbers
        if self.compiled:
            # As tensors: a number would be compiled in, and the learning rate changes every step.
            values = [torch.full((), n, device=weights[0].device) for n in numbers]
        self._kernel(weights, gradients, momenta, *values)


def sign_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    gain: float | Tensor,
    shrink: float | Tensor,
    rate: float | Tensor,
) -> None:
    """One step in place.

    Args:
        weights: w.
        gradients: g, left as they are.
        momenta: m; none of them for signSGD.
        gain: 1 - beta.
        shrink: 1 - lr * weight_decay.
        rate: -lr.
    """
    if momenta and isinstance(gain, Tensor):
        # lerp's own formula: with a tensor for its weight it compiles to code four times as slow.
        differences = torch._foreach_sub(gradients, momenta)
        torch._foreach_mul_(differences, gain)
        torch._foreach_add_(momenta, differences)
    elif momenta:
        torch._foreach_lerp_(momenta, gradients, float(gain))
    signs = torch._foreach_sign(momenta or gradients)
    torch._foreach_mul_(weights, shrink)
    torch._foreach_mul_(signs, rate)
    torch._foreach_add_(weights, signs)


def held(tensors: list[Tensor]) -> list[Tensor]:
    """Those of which this rank holds any row."""
    return [tensor for tensor in tensors if tensor.numel()]


def build_signum(model: nn.Module, settings: SignumSettings) -> Signum:
    """Signum over all trainable parameters of a model that is already laid over ranks."""
    groups = decay_groups(
        model, weight_decay=settings.weight_decay, matrices_only=settings.decay_matrices_only
    )
    return Signum(groups, lr=settings.lr, momentum=settings.momentum, compile=settings.compile)
