"""What some noise scales read of the optimizer: how a weight's step follows from its gradient.

It is read at each measurement, since groups change with the batch size and are replaced as an
optimizer is loaded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gns_pretrain.model.roles import Role
from gns_pretrain.noise_scale.equations import momentum_noise
from gns_pretrain.noise_scale.geometries import Training
from gns_pretrain.noise_scale.weights import TappedWeight

ADAMS = {"exp_avg_sq", "step"}  # what Adam and its relatives keep of a weight, beside the momentum


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
    def has_weights(self) -> bool:
        """Whether the optimizer steps any weight that is measured."""
        return any(rule is not None for _, rule in self._of_weights())

    @property
    def adams(self) -> list[bool]:
        """Whether each weight is trained by Adam or a relative, which keeps second moments.

        Groups alone tell it before a rule's first step. State tells more: Adamax keeps a maximum,
        and some libraries' classes count otherwise, and keep what is no v of torch's Adam.
        """
        kept: dict[int, set[str]] = {}
        of_weights = self._of_weights()
        for tapped, (_, rule) in zip(self.weights, of_weights, strict=True):
            kept.setdefault(id(rule), set()).update(self.optimizer.state.get(tapped.weight, ()))
        return [
            is_like_adam(group, rule) and (not kept[id(rule)] or kept[id(rule)] >= ADAMS)
            for group, rule in of_weights
        ]

    @property
    def has_constant_momenta(self) -> bool:
        """Whether each weight's momentum, if it has one, is an average with its group's beta.

        NAdam's beta changes from step to step, Lion has two, a schedule-free one is no momentum.
        """
        return all(
            "momentum_decay" not in group and ("betas" not in group or is_like_adam(group, rule))
            for group, rule in self._of_weights()
        )

    @property
    def along_matrix_signs(self) -> list[bool]:
        """Whether each weight's steps go along its matrix sign, as long as the rate says."""
        return [
            isinstance(rule, SignRule) and rule.has_fixed_steps for _, rule in self._of_weights()
        ]

    @property
    def training(self) -> Training:
        """What geometries ask of the optimizer before they read it."""
        is_matrix = [tapped.role is Role.MATRIX for tapped in self.weights]
        return Training(is_matrix, self.adams, self.along_matrix_signs)

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

    def scales(self, means: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return this rank's rows of v'^(1/2) + epsilon, by which Adam will divide, by weight.

            v = beta2 v + (1 - beta2) g^2    v' = v / (1 - beta2^t)

        AMSGrad divides by the largest v there was. A weight decay that is coupled is part of g.

        Args:
            means: g, this rank's rows of each weight's mean gradient, or the first of them; it is
                not clipped yet.
        """
        scales = {}
        of_weights = zip(self.weights, self._of_weights(), self.adams, means, strict=True)
        for index, (tapped, (group, _), is_adams, mean) in enumerate(of_weights):
            state = self.optimizer.state.get(tapped.weight, {})
            if not is_adams or "exp_avg_sq" not in state:
                continue

            def rows(tensor: Tensor, tapped: TappedWeight = tapped, mean: Tensor = mean) -> Tensor:
                return tapped.rows_in_layout(tensor)[: len(mean)].float()

            gradient = mean
            if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
                decay = group["weight_decay"] * (-1.0 if group.get("maximize") else 1.0)
                gradient = mean + decay * rows(tapped.weight)
            beta2 = group["betas"][1]
            squares = rows(state["exp_avg_sq"]).mul(beta2)
            squares.addcmul_(gradient, gradient, value=1.0 - beta2)
            if "max_exp_avg_sq" in state:
                squares = torch.maximum(squares, rows(state["max_exp_avg_sq"]))
            # A tensor, of the device where the optimizer counts: nothing is waited for.
            bias = 1.0 - beta2 ** (state["step"] + 1)
            scales[index] = squares.div_(bias).sqrt_().add_(group["eps"])
        return scales

    def _of_weights(self) -> list[tuple[dict[str, Any], torch.optim.Optimizer | None]]:
        """Return each weight's group and the rule that steps it; nothing where none does."""
        found = {
            id(parameter): (group, rule)
            for rule in rules_within(self.optimizer)
            for group in rule.param_groups
            for parameter in group["params"]
        }
        return [found.get(id(tapped.weight), ({}, None)) for tapped in self.weights]


def is_like_adam(group: dict[str, Any], rule: torch.optim.Optimizer | None) -> bool:
    """Whether a group is Adam's or a relative's, by its hyperparameters.

    Not of a schedule-free one, which has `eval` and neither a momentum nor Adam's count.
    """
    return len(group.get("betas", ())) == 2 and "eps" in group and not hasattr(rule, "eval")


def rules_within(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer, or those that it joins."""
    joined = getattr(optimizer, "optimizers", None)
    if not joined:
        yield optimizer
        return
    for each in joined:
        yield from rules_within(each)
