"""Averages of weights: exponential, uniform, and those that gradients are taken near (GPA).

Legend: z the weights that an optimizer steps from; x their average, which is evaluated, saved and
exported; y the training weights, where gradients are taken. One recursion has all kinds:

    y_t = mu x_t + (1 - mu) z_t
    z_t+1 = a step of the optimizer from z_t, by the gradient at y_t
    x_t+1 = (1 - c) x_t + c z_t+1

mu = 0 trains as without an average (y = z). With a constant c it is Generalized Primal Averaging
(GPA, arXiv:2512.17131; its mu_y is mu, its mu_x is 1 - c), with c = 1 / t the averaging of
schedule-free learning (arXiv:2405.15682; its beta is mu).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, one_of, within
from gns_pretrain.model.batch_norm import BatchNorm
from gns_pretrain.model.roles import named_trainable
from gns_pretrain.optim.base import Group, OptimizerSettings
from gns_pretrain.optim.combined import CombinedOptimizer
from gns_pretrain.optim.width import scale_learning_rates
from gns_pretrain.parallel.sharding import local_shards, reshard

COUNTERPART, TOTAL = "counterpart", "average_total"  # keys of the state, part of checkpoints


@dataclass
class AveragingSettings(Settings):
    """Which average of the weights is evaluated, saved and exported; none by default."""

    section: ClassVar[str] = "averaging"

    # ema: exponential; uniform: every step counts once
    kind: Annotated[str, one_of("none", "ema", "uniform")] = "none"
    # share of the average that a step keeps, for ema
    decay: Annotated[float | None, within(0, 1, hint="0.99 to 0.9999 are usual")] = None
    # gradients are taken at this share of the average and the rest of the weights that step
    interpolation: Annotated[float, within(0, 1, hint="0 trains as without an average")] = 0.0
    # of the budget; before it the average is the last weights
    start: Annotated[float, within(0, 1, hint="0.8 averages the last fifth")] = 0.0
    # whether the average begins with the weights of its start; false: it is of later steps alone
    count_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "ema" and self.decay is None:
            raise InputError("averaging.kind=ema needs averaging.decay; 0.999 is usual")
        of_averages = ("decay", "interpolation", "start", "count_first")
        for name in {"none": of_averages, "uniform": ("decay",), "ema": ()}[self.kind]:
            if (value := getattr(self, name)) != getattr(AveragingSettings, name):
                raise InputError(
                    f"averaging.{name}={value} is not read by averaging.kind={self.kind}; leave it "
                    "out, or choose averaging=ema, uniform or gpa"
                )

    def build(
        self, settings: OptimizerSettings, model: nn.Module, *, width: float = 1.0
    ) -> torch.optim.Optimizer:
        """Build an optimizer over a model that `parallelize` returned, with its average.

        Args:
            settings: of the optimizer.
            model: whose parameters it is over.
            width: by which learning rates go (`scale_learning_rates`).

        Raises:
            InputError: the optimizer averages by itself, or the model has running statistics, which
                are those of the training weights.
        """
        optimizer = scale_learning_rates(settings.build(model), model, width)
        faces = two_faced(optimizer)
        if faces and self.kind != "none":
            raise InputError(
                f"averaging.kind={self.kind} averages what {type(faces[0]).__name__} averages "
                "already, as its train() and eval() say; use averaging=none",
                on_all_ranks=True,
            )
        if self.kind != "none":
            optimizer = AveragingOptimizer(
                optimizer,
                decay=self.decay,
                interpolation=self.interpolation,
                start=self.start,
                count_first=self.count_first,
            )
        for face in two_faced(optimizer):
            if any(isinstance(module, BatchNorm) for module in model.modules()):
                raise InputError(
                    "averaged weights have other running statistics of batch normalization than "
                    "the training weights, whose the model has; use averaging=none, an optimizer "
                    "without train() and eval(), or a model without batch normalization",
                    on_all_ranks=True,
                )
            face.train()
        # Libraries look into the state here, and a defaultdict then has entries; where there are
        # any, torch.distributed.checkpoint takes the state for made.
        for weight in [weight for weight, state in optimizer.state.items() if not state]:
            del optimizer.state[weight]
        return optimizer


def exponential_share(total: float, decay: float) -> tuple[float, float]:
    """Share c of the coming weights in an exponential average.

        V' = mu V + 1 - mu;  c = (1 - mu) / V'

    V is what the weights in the average add up to: from 0 on, x is the average of the steps alone
    (the first c is 1, as Adam corrects its bias); from 1 on, c = 1 - mu, and the first weights
    count as well, as GPA's do.

    Args:
        total: V before the step.
        decay: mu.

    Returns:
        V' and c.
    """
    total = decay * total + (1.0 - decay)
    return total, (1.0 - decay) / total


def uniform_share(total: float) -> tuple[float, float]:
    """Number of weights in a uniform average with the coming ones, and the share of each."""
    return total + 1.0, 1.0 / (total + 1.0)


def to_stepping_(weights: list[Tensor], averages: list[Tensor], interpolation: float) -> None:
    """Set y to z = y + mu / (1 - mu) (y - x), in place.

    y is kept and z computed, so that of three copies two are there and evaluation swaps them
    without rounding. It costs z a rounding of y, 1 / (1 - mu) times, a step.
    """
    if weights and interpolation:
        torch._foreach_lerp_(weights, averages, -interpolation / (1.0 - interpolation))


def average_(
    weights: list[Tensor], averages: list[Tensor], *, share: float, interpolation: float
) -> None:
    """Move x to z by a share, x' = (1 - c) x + c z, then z to y' = mu x' + (1 - mu) z; in place.

    Args:
        weights: z, whole tensors or local shards.
        averages: x, sharded like the weights.
        share: c.
        interpolation: mu.
    """
    if weights:
        torch._foreach_lerp_(averages, weights, share)
    if weights and interpolation:
        torch._foreach_lerp_(weights, averages, interpolation)


class AveragingOptimizer(CombinedOptimizer):
    """Any optimizer, with an average of the weights beside it.

        optimizer = AveragingOptimizer(torch.optim.AdamW(model.parameters()), decay=0.999)
        with averaged_weights(model, optimizer):
            evaluate(model)

    Groups and state are the optimizer's own, and each weight has one more tensor in its state,
    sharded like it and of its dtype: the average while the model trains, the training weight while
    it is evaluated. `eval()` and `train()` swap the two, bit for bit.

    Args:
        optimizer: of whole tensors or DTensors; it steps where it stepped before, except that its
            gradients are taken nearer to the average with `interpolation`.
        decay: of an exponential average, in [0, 1); None averages uniformly.
        interpolation: mu of the module's text, in [0, 1).
        start: share of the budget before which the average is the last weights; `set_progress`.
        count_first: whether the average begins with the weights of its start.

    Raises:
        InputError: a value that cannot be, or an optimizer that averages by itself.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        decay: float | None = None,
        interpolation: float = 0.0,
        start: float = 0.0,
        count_first: bool = False,
    ) -> None:
        kind = "uniform" if decay is None else "ema"
        AveragingSettings(kind, decay, interpolation, start, count_first)  # checks them
        if faces := two_faced(optimizer):
            raise InputError(
                f"AveragingOptimizer averages what {type(faces[0]).__name__} averages already, as "
                "its train() and eval() say; use one of them alone"
            )
        super().__init__([optimizer])
        self.interpolation, self.start, self.count_first = interpolation, start, count_first
        self.progress = 1.0  # share of the budget that is consumed
        self.training = True
        for group in self.param_groups if decay is not None else ():
            group["average_decay"] = decay

    def rules(self) -> list[str]:
        kinds = {"average_decay" in group for group in self.param_groups}
        return ["exponential average" if True in kinds else "uniform average", *super().rules()]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of the optimizer, then average; return the value of `closure`, run first.

        Raises:
            RuntimeError: after `eval()`, when the weights are the average.
        """
        if not self.training:
            raise RuntimeError("the weights are the average; call train() before a step")
        loss = torch.enable_grad()(closure)() if closure else None
        # An optimizer makes its own state where there is none: ours comes into it after its step.
        first = {
            weight: weight.detach().clone()
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None and not self._has_average(weight)
        }
        for group in self.param_groups:
            to_stepping_(*self._pairs(group), self.interpolation)
        super().step()
        for weight, value in first.items():
            self.state[weight] |= {COUNTERPART: value, TOTAL: None}
        for group in self.param_groups:
            share = self._next_share(group)
            average_(*self._pairs(group), share=share, interpolation=self.interpolation)
        return loss

    def eval(self) -> None:
        """Let the weights be the average; nothing happens if they are."""
        if self.training:
            self._swap()
        self.training = False

    def train(self) -> None:
        """Let the weights be those that train; nothing happens if they are."""
        if not self.training:
            self._swap()
        self.training = True

    def _has_average(self, weight: Tensor) -> bool:
        return weight in self.state and COUNTERPART in self.state[weight]

    def _averaged(self, group: Group) -> list[nn.Parameter]:
        return [weight for weight in group["params"] if self._has_average(weight)]

    def _pairs(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """Local shards of a group's weights, and of their counterparts."""
        weights = self._averaged(group)
        return local_shards(weights), local_shards(self.state[w][COUNTERPART] for w in weights)

    def _next_share(self, group: Group) -> float:
        """Count a step of a group in its weights' state; return its share of the average."""
        states = [self.state[weight] for weight in self._averaged(group)]
        # A weight whose first gradient came late has not moved, so any average of it is itself.
        known = [state[TOTAL] for state in states if state[TOTAL] is not None]
        total, share = max(known, default=float(self.count_first)), 1.0
        if self.progress >= self.start:
            if "average_decay" in group:
                total, share = exponential_share(total, group["average_decay"])
            else:
                total, share = uniform_share(total)
        for state in states:
            state[TOTAL] = total
        return share

    @torch.no_grad()
    def _swap(self) -> None:
        for group in self.param_groups:
            for weight, other in zip(*self._pairs(group), strict=True):
                kept = weight.clone()
                weight.copy_(other)
                other.copy_(kept)


@runtime_checkable
class TwoFaced(Protocol):
    """An optimizer that trains other weights than are to be evaluated, as schedule-free ones do."""

    param_groups: list[Group]

    def train(self) -> Any:
        """Let the weights be those that train."""

    def eval(self) -> Any:
        """Let the weights be those that are evaluated."""


def two_faced(optimizer: torch.optim.Optimizer) -> list[TwoFaced]:
    """Return those of an optimizer, or of the ones joined in it, that have `train` and `eval`."""
    if isinstance(optimizer, TwoFaced):
        return [optimizer]
    parts = optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else []
    return [face for part in parts for face in two_faced(part)]


def set_progress(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Tell an average with a start what share of the budget is consumed, before a step."""
    if isinstance(optimizer, AveragingOptimizer):
        optimizer.progress = fraction


@contextmanager
def averaged_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[dict[str, Tensor]]:
    """Let a model have its averaged weights inside the block, and train on bit for bit after it.

    Nothing happens for an optimizer without `train()` and `eval()`. All ranks call it together.

    Args:
        model: plain, or parallelized.
        optimizer: of its weights.

    Yields:
        Copies of the training weights, by their names, whose optimizer does not swap them exactly.
    """
    faces = two_faced(optimizer)
    if not faces:
        yield {}
        return
    reshard(model)  # what an evaluation has left gathered hides the weights
    inexact = {
        weight
        for face in faces
        if not isinstance(face, AveragingOptimizer)
        for group in face.param_groups
        for weight in group["params"]
    }
    weights = {name: weight for name, weight in named_trainable(model) if weight in inexact}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for face in faces:
            face.eval()
        yield kept
    finally:
        for face in faces:
            face.train()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
        reshard(model)
