"""Signum and signSGD: the rules of the Manhattan geometry (arXiv:2602.03001, Section 2.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gns_pretrain.fields import checked, one_of
from gns_pretrain.model.parametrization import StepSize
from gns_pretrain.optim.base import Beta, Group, OptimizerSettings, Rule, gradients_of
from gns_pretrain.parallel.sharding import local_shards

Compile = Annotated[str, one_of("auto", "always", "never")]


@dataclass
class SignumSettings(OptimizerSettings):
    """Signum; with momentum 0 it is signSGD."""

    name: str = "signum"
    momentum: Beta = 0.95  # m = beta m + (1 - beta) g; the paper searches 0.7 to 0.999
    compile: Compile = "auto"  # one kernel; auto: on GPUs

    def build(self, model: nn.Module) -> "Signum":
        """Build Signum over all trainable parameters."""
        groups = self.parameter_groups(model)
        return Signum(groups, lr=self.lr, momentum=self.momentum, compile=self.compile)


class Signum(Rule):
    """Steepest descent in the Manhattan geometry, with decoupled weight decay.

        m = beta m + (1 - beta) g
        w = (1 - lr * weight_decay) w - lr sign(m)

    Coordinates are independent, so each rank updates its local shard without communication. With
    beta = 0 it is signSGD and keeps no state.

    Args:
        params, lr, momentum, weight_decay: as in `Rule`.
        compile: whether torch.compile makes one kernel for all tensors: "never", "always", or
            "auto", on GPUs.
    """

    step_size = StepSize.COORDINATE

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        compile: Compile = "never",
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        on_gpu = self.param_groups[0]["params"][0].device.type == "cuda"
        self.compiled = compile == "always" or (compile == "auto" and on_gpu)
        self._kernel: Callable[..., None] = torch.compile(sign_step) if self.compiled else sign_step

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along the signs of each group's momentum, or of its gradients."""
        for group, parameters in trained:
            beta, lr = group["momentum"], group["lr"]
            # Momenta come first: their state is checkpointed, also where a shard has no rows.
            momenta = nonempty(local_shards(self.momenta(parameters))) if beta else []
            weights = nonempty(local_shards(parameters))
            gradients = nonempty(local_shards(gradients_of(parameters)))
            if not weights:
                continue
            numbers: Sequence[Any] = (1 - beta, 1 - lr * group["weight_decay"], -lr)
            if self.compiled:
                # As tensors: numbers would be compiled in, and the learning rate changes each step.
                numbers = [torch.full((), n, device=weights[0].device) for n in numbers]
            self._kernel(weights, gradients, momenta, *numbers)


class SignSGD(Signum):
    """Signum without momentum: w = (1 - lr * weight_decay) w - lr sign(g)."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        compile: Compile = "never",
    ) -> None:
        super().__init__(params, lr, momentum=0.0, weight_decay=weight_decay, compile=compile)


def sign_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    gain: float | Tensor,
    shrink: float | Tensor,
    rate: float | Tensor,
) -> None:
    """Take one step in place: gain is 1 - beta, shrink 1 - lr * weight_decay and rate -lr.

    The gradients are left as they are; signSGD has no momenta.
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


def nonempty(tensors: list[Tensor]) -> list[Tensor]:
    """Drop local shards without rows."""
    return [tensor for tensor in tensors if tensor.numel()]
