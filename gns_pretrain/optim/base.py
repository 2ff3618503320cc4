"""What optimizers share: settings that build them, parameter groups, momentum, half-lives.

An optimizer is one settings class in a file of this package, and one YAML in conf/optimizer:

    @dataclass
    class LionSettings(OptimizerSettings):
        name: str = "lion"  # registers the class; its YAML starts from `schema_lion`
        momentum: Beta = 0.95

        def build(self, model: nn.Module) -> Lion:
            return Lion(self.parameter_groups(model), lr=self.lr, momentum=self.momentum)
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Bound, Settings, check_values, positive, within
from gns_pretrain.model.parametrization import StepSize
from gns_pretrain.model.roles import named_trainable
from gns_pretrain.optim.power_lines import Timescale, timescale_by_rule, weight_decay_of
from gns_pretrain.parallel.sharding import local_shards

Group = dict[str, Any]  # an entry of `param_groups`

LearningRate = Annotated[float, positive(hint="1e-3 is a usual peak")]
WeightDecay = Annotated[float, within(0, math.inf, hint="0.1 is usual")]
Beta = Annotated[float, within(0, 1, hint="0.9 is usual")]  # coefficient of a running average
Bounds = Annotated[
    list[float],
    Bound(
        lambda bounds: len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1,
        "must be two numbers from 0 to 1, in order",
        "[0,1] bounds nothing",
    ),
]

OPTIMIZERS: dict[str, type["OptimizerSettings"]] = {}  # by name; filled by defining a subclass


@dataclass
class OptimizerSettings(Settings):
    """Base of each optimizer's settings; a subclass with a name of its own is registered."""

    section: ClassVar[str] = "optimizer"

    name: str = "???"
    lr: LearningRate = 1e-3  # peak, before the schedule and the batch size's multiplier
    weight_decay: WeightDecay = 0.1  # decoupled; the paper's value
    # in place of weight_decay: the fraction of the run that weights average over, at the peak
    # learning rate and in tokens, whatever the batch; auto: by tokens a parameter (AdamW's law)
    weight_decay_timescale: Timescale = None
    decay_matrices_only: bool = True  # norms' weights are not decayed
    tie_to_tokens: bool = False  # averages and decay keep their half-life in tokens as B changes
    # the smallest and the largest beta2 (the last of an optimizer's betas) that tie_to_tokens makes
    tied_beta2: Bounds = field(default_factory=lambda: [0.9, 0.9999])

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in (self, *self._parts.values()) if self.weight_decay_timescale else ():
            if part.weight_decay not in (0.0, type(part).weight_decay):
                raise InputError(
                    f"{part.section}.weight_decay={part.weight_decay:g} and optimizer."
                    f"weight_decay_timescale={self.weight_decay_timescale} both say how weights "
                    f"decay; use {part.section}.weight_decay=0, or a timescale of null"
                )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            OPTIMIZERS[cls.name] = cls

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer over a model that `parallelize` returned."""
        raise NotImplementedError

    def parameter_groups(self, model: nn.Module) -> list[Group]:
        """Group all trainable parameters by whether they are decayed."""
        return decay_groups(
            [parameter for _, parameter in named_trainable(model)],
            weight_decay=self.weight_decay,
            matrices_only=self.decay_matrices_only,
        )

    @property
    def _parts(self) -> dict[str, Any]:
        """The settings within, for the parameters that a matrix rule leaves, by their fields."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "weight_decay")}

    def timescale(self, *, steps: float, tokens_per_parameter: Callable[[], float]) -> float | None:
        """weight_decay_timescale as a number; None where weight_decay holds.

        Args:
            steps: of the run, at its first batch size.
            tokens_per_parameter: of the run, asked for auto.

        Raises:
            InputError: it is less than a step, so that a step would turn weights around; or auto,
                and the law says nothing of so many tokens a parameter.
        """
        text = self.weight_decay_timescale
        if text is None:
            return None
        timescale = timescale_by_rule(tokens_per_parameter()) if text == "auto" else float(text)
        if timescale * steps < 1.0:
            raise InputError(
                f"optimizer.weight_decay_timescale={timescale:.3g} of {steps:.3g} steps is less "
                f"than one step; use at least {1.0 / steps:.3g}"
            )
        return timescale

    def decaying(self) -> Self:
        """The same settings with a weight decay of 1 in all parts, for `set_timescale` to set."""
        parts = {name: replace(part, weight_decay=1.0) for name, part in self._parts.items()}
        return replace(self, weight_decay=1.0, weight_decay_timescale=None, **parts)


def set_timescale(optimizer: torch.optim.Optimizer, timescale: float, *, steps: float) -> None:
    """Set each decay that is not zero so that weights average over a fraction of `steps` steps."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay_of(timescale, lr=group["peak_lr"], steps=steps)


def check_nesterov(nesterov: bool, momentum: float, section: str = "") -> None:
    """Refuse Nesterov's look-ahead without a momentum."""
    if nesterov and momentum == 0:
        prefix = f"{section}." if section else ""
        raise InputError(
            f"{prefix}nesterov=true looks ahead along the momentum, and {prefix}momentum=0; use a "
            f"momentum such as 0.9, or {prefix}nesterov=false"
        )


def decay_groups(
    parameters: Sequence[nn.Parameter], *, weight_decay: float, matrices_only: bool
) -> list[Group]:
    """Group parameters by whether they are decayed, in their order.

    With `matrices_only` what has fewer than two dimensions, such as the norms' weights, goes to a
    second group, without weight decay.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (plain if matrices_only and parameter.ndim < 2 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def remember_peaks(optimizer: torch.optim.Optimizer) -> None:
    """Keep each group's peak learning rate beside the current one; both are checkpointed."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to its peak times `factor`; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


class GroupKeys(TypedDict):
    """What each group of a `Rule` sets for itself; these keys are part of checkpoints."""

    lr: LearningRate
    weight_decay: WeightDecay
    momentum: Beta


class Rule(torch.optim.Optimizer):
    """An optimizer whose state is sharded like its parameters: one momentum buffer each, or none.

    Parameters are whole tensors or DTensors, of FSDP2, tensor parallelism or both; each rank
    updates its local shard in place. Those without a gradient are left as they are, without state.

    Args:
        params: parameters, named ones or groups of them, as torch.optim takes them; all on one
            device. A group may set `lr`, `weight_decay` and `momentum` for itself.
        lr: positive.
        momentum: in [0, 1); 0 keeps no state.
        weight_decay: decoupled; a step shrinks weights by lr * weight_decay.
        more: what else each group has, and may set for itself.

    Raises:
        InputError: a value out of its range, another argument in a group, several devices, or a
            vector given to a rule of matrices.
    """

    takes_matrices: ClassVar[bool] = False  # parameters of at least 2 dimensions alone
    # by which learning rates follow a model's width; None: they do not
    step_size: StepSize | None = None

    def __init__(
        self, params: ParamsT, *, lr: float, momentum: float, weight_decay: float, **more: Any
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | more)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as torch's optimizers do; on all ranks."""
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def check_group(self, group: Group) -> None:
        """Refuse a group with values out of their range, or that this rule cannot update."""
        check_values(GroupKeys, {name: group[name] for name in GroupKeys.__annotations__})
        arguments = inspect.signature(type(self)).parameters.keys() - {"params", *self.defaults}
        if misplaced := sorted(arguments & group.keys()):
            raise InputError(
                f"a parameter group sets {misplaced[0]}, which all groups share; give it to "
                f"{type(self).__name__} itself"
            )
        devices = {parameter.device for each in self.param_groups for parameter in each["params"]}
        if len(devices) > 1:
            raise InputError(
                f"parameters are on {' and '.join(sorted(map(str, devices)))}; make one "
                f"{type(self).__name__} for each device, and join them with CombinedOptimizer"
            )
        for parameter in group["params"] if self.takes_matrices else ():
            if parameter.ndim < 2:
                raise InputError(
                    f"{type(self).__name__} takes matrices, and a parameter has the shape "
                    f"{list(parameter.shape)}; give it to another optimizer (split_parameters "
                    "finds the matrices)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the value of `closure`, run first."""
        loss = torch.enable_grad()(closure)() if closure else None
        trained = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        self.update([(group, parameters) for group, parameters in trained if parameters])
        return loss

    @abstractmethod
    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Change parameters in place, given each group's that have a gradient."""

    def momenta(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return each parameter's momentum buffer, zeros at first."""
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return each parameter's gradient, sharded like the parameter."""
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        placements = getattr(parameter, "placements", None)
        # Tensor parallelism alone can leave partial sums, of a norm's weight, say.
        if isinstance(gradient, DTensor) and gradient.placements != placements:
            gradient = gradient.redistribute(placements=placements)
        gradients.append(gradient)
    return gradients


def summed_momentum(
    gradients: list[Tensor], momenta: list[Tensor], group: Group, *, nesterov: bool
) -> list[Tensor]:
    """Update momenta that are sums and not averages; return the step's direction.

        m = beta m + gain g;  d = gain g + beta m (Nesterov) or m

    Args:
        gradients: g, whole tensors or local shards.
        momenta: m, sharded like the gradients; updated in place.
        group: whose momentum beta is; the gain is 1 unless half-lives are kept (`momentum_gain`).

    Returns:
        d, sharded like the gradients; without Nesterov the momenta themselves.
    """
    beta, gain = group["momentum"], momentum_gain(group)
    rows = local_shards(momenta)
    torch._foreach_mul_(rows, beta)
    torch._foreach_add_(rows, local_shards(gradients), alpha=gain)
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
    """Set w = shrink w - lr d in place, on local shards.

    Args:
        directions: d, the local shard of each w.
        lr: of this step; a 0-dim tensor where only the device knows it.
        shrink: 1 - lr * weight_decay, the decoupled decay.
    """
    weights = local_shards(parameters)
    torch._foreach_mul_(weights, shrink)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(weights, directions, alpha=-lr)


TIED = (
    "momentum",
    "betas",
    "weight_decay",
    "average_decay",
)  # of a group, what forgets once a step


def keep_token_half_life(
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    *,
    tied: Sequence[str] = TIED,
    beta2: Sequence[float] = (0.0, 1.0),
) -> None:
    """Let momenta, betas and weight decays follow the batch size, from the initial B_0 on.

    A step of B sequences moves B / B_0 times as many tokens as one of B_0, so what forgets once a
    step has to forget that much more of it. The paper changes the learning rate alone. What is
    called otherwise (another library's rho, say) stays.

    Args:
        batch_size: B_0, sequences.
        tied: what of a group follows.
        beta2: the smallest and the largest value of the last of betas; (0, 1) bounds nothing.
    """
    for group in optimizer.param_groups:
        # These keys are part of checkpoints; those of runs before bounds have none.
        initial = {f"tied_{name}": group[name] for name in tied if name in group}
        if "tied_betas" in initial and tuple(beta2) != (0.0, 1.0):
            initial["tied_beta2"] = tuple(beta2)
        group.update(initial, tied_batch_size=batch_size)


def tied_beta(beta: float, growth: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """Coefficient of an average that forgets as fast in tokens at `growth` times the batch.

    beta' = beta^growth    within [low, high], which leave beta itself as it is
    """
    return min(max(beta**growth, min(low, beta)), max(high, beta))


def update_half_life(
    optimizer: torch.optim.Optimizer, batch_size: int, *, lr_multiplier: float = 1.0
) -> dict[str, Any]:
    """Set momenta, betas and weight decays for a step of B sequences.

        beta' = beta^(B / B_0)    (`tied_beta`; beta2 within its bounds)
        (lr * multiplier) * decay' = lr * decay * B / B_0

    An average keeps its half-life of -B ln 2 / ln beta' sequences. A weight shrinks by lr * decay a
    step, so its half-life in tokens stays, to first order in lr * decay; with the multiplier
    sqrt(B / B_0) the decay itself grows as sqrt(B / B_0).

    Args:
        optimizer: nothing happens to groups that `keep_token_half_life` has not seen.
        batch_size: B, sequences of the coming step.
        lr_multiplier: what the batch size has done to the learning rate already.

    Returns:
        What was set, by its names in a group: of the first group that has it.
    """
    changed: dict[str, Any] = {}
    for group in optimizer.param_groups:
        if "tied_batch_size" not in group:
            continue
        growth = batch_size / group["tied_batch_size"]
        if "tied_momentum" in group:
            group["momentum"] = tied_beta(group["tied_momentum"], growth)
        if "tied_betas" in group:
            *first, last = group["tied_betas"]
            low, high = group.get("tied_beta2", (0.0, 1.0))
            second = tied_beta(last, growth, low=low, high=high)
            group["betas"] = (*(tied_beta(beta, growth) for beta in first), second)
        if "tied_average_decay" in group:
            group["average_decay"] = tied_beta(group["tied_average_decay"], growth)
        if "tied_weight_decay" in group:
            group["weight_decay"] = group["tied_weight_decay"] * growth / lr_multiplier
        changed = {name: group[name] for name in TIED if f"tied_{name}" in group} | changed
    return changed


def momentum_gain(group: Group) -> float:
    """Factor of the gradients in a momentum that sums them, m = beta' m + gain g.

        gain = (1 - beta') / (1 - beta)    exactly 1 without `keep_token_half_life`

    Such a sum settles at g / (1 - beta) times its gain, so the step's length stays what it was at
    B_0 and the learning rate's multiplier alone changes it. Averages need none.
    """
    beta: float = group["momentum"]
    initial: float = group.get("tied_momentum", beta)
    return (1.0 - beta) / (1.0 - initial)
