"""What some noise scales read of the optimizer: how a weight's step follows from its gradient.

It is read at each measurement, since groups change with the batch size and are replaced as an
optimizer is loaded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gns_pretrain.noise_scale.equations import momentum_noise
from gns_pretrain.noise_scale.weights import TappedWeight


@runtime_checkable
class SignRule(Protocol):
    """A rule whose steps are a rate times `sign_scaling` times a matrix sign."""

    has_fixed_steps: bool  # whether the rate is the learning rate itself

    def sign_scaling(self, group: dict[str, Any], matrix: Tensor) -> float: ...


class Updates:
    """An optimizer as seen from the weights that are measured.

    Args:
        optimizer: over the model's parameters; one that joins others has them as `optimizers`, as
            `CombinedOptimizer` does.
        weights: those of the tap, in whose order everything is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[TappedWeight]) -> None:
        self.optimizer = optimizer
        self.weights = weights

    @property
    def has_second_moments(self) -> bool:
        """Whether some weight has taken a step of Adam or one of its relatives."""
        return any("exp_avg_sq" in state for state in self.optimizer.state.values())

    @property
    def adams(self) -> list[bool]:
        """Whether each weight is trained by Adam or a relative, which keeps second moments.

        Not by a schedule-free one, which has `eval` and neither a momentum nor Adam's count.
        """
        return [
            len(group.get("betas", ())) == 2 and "eps" in group and not hasattr(rule, "eval")
            for group, rule in self._of_weights()
        ]

    @property
    def along_matrix_signs(self) -> list[bool]:
        """Whether each weight's steps go along its matrix sign, as long as the rate says."""
        return [
            isinstance(rule, SignRule) and rule.has_fixed_steps for _, rule in self._of_weights()
        ]

    def lengths(self) -> list[float]:
        """Return each weight's step along a direction of unit norm: peak rate x rule's scaling.

        Of Adam, whose direction has no norm of its own, it is the rate.
        """
        found = []
        for tapped, (group, rule) in zip(self.weights, self._of_weights(), strict=True):
            length = float(group.get("peak_lr", group.get("lr", 0.0)))
            if isinstance(rule, SignRule):
                length *= rule.sign_scaling(group, tapped.weight)
            found.append(length)
        return found

    def momentum_noise(self) -> list[float]:
        """Return each weight's `equations.momentum_noise`, by its group's current coefficient."""
        found = []
        for group, rule in self._of_weights():
            beta = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
            nesterov = bool(group.get("nesterov", getattr(rule, "nesterov", False)))
            found.append(momentum_noise(beta, nesterov=nesterov))
        return found

    def scales(self, means: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield this rank's rows of each weight's v'^(1/2) + epsilon, by which Adam will divide.

            v = beta2 v + (1 - beta2) g^2    v' = v / (1 - beta2^t)

        A weight without v has inf: what is divided by it adds nothing.

        Args:
            means: g, this rank's rows of each weight's mean gradient, or the first of them; it is
                not clipped yet.
        """
        of_weights = zip(self.weights, self._of_weights(), means, strict=True)
        for tapped, (group, _), mean in of_weights:
            state = self.optimizer.state.get(tapped.weight, {})
            if "exp_avg_sq" not in state:
                yield torch.full_like(mean, torch.inf)
                continue
            beta2 = group["betas"][1]
            squares = tapped.rows_in_layout(state["exp_avg_sq"])[: len(mean)]
            squares = squares.float().mul(beta2).addcmul_(mean, mean, value=1.0 - beta2)
            # A tensor, of the device where the optimizer counts: nothing is waited for.
            bias = 1.0 - beta2 ** (state["step"] + 1)
            yield squares.div_(bias).sqrt_().add_(group["eps"])

    def _of_weights(self) -> list[tuple[dict[str, Any], torch.optim.Optimizer | None]]:
        """Return each weight's group and the rule that steps it; nothing where none does."""
        found = {
            id(parameter): (group, rule)
            for rule in rules_within(self.optimizer)
            for group in rule.param_groups
            for parameter in group["params"]
        }
        return [found.get(id(tapped.weight), ({}, None)) for tapped in self.weights]


def rules_within(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer, or those that it joins."""
    joined = getattr(optimizer, "optimizers", None)
    if not joined:
        yield optimizer
        return
    for each in joined:
        yield from rules_within(each)
