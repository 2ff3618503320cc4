"""Policies of the batch size: where a run stands and what was measured in, a wanted size out.

One flat `PolicySettings` serves every policy, and each reads its own: what depends on the size of
an experiment can then be set whatever the role of a run in it. A new policy is one class in this
file: defining it with a `name` registers it, and `batch_size.policy` then accepts that name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, ClassVar

from gns_pretrain.batch_size.step_times import StepTime
from gns_pretrain.errors import InputError
from gns_pretrain.fields import (
    About,
    at_least,
    check_bounds,
    key_of,
    one_of,
    positive,
    setting_name,
    within,
)
from gns_pretrain.noise_scale.equations import target_batch_size
from gns_pretrain.noise_scale.geometries import GEOMETRIES, RECORDED_INFLECTION
from gns_pretrain.noise_scale.smoothing import (
    SmoothedNoiseScale,
    SmoothedProgress,
    SmoothingSettings,
)

ROUNDINGS = ("down", "up")
# Of B / B_0, on the scheduled learning rate (Algorithm 1, line 10); sqrt is the paper's.
LR_EXPONENTS = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
POLICIES: dict[str, type["Policy"]] = {}  # by name; filled by defining a subclass
FEWEST_MEASUREMENTS = 4  # of progress, for a standard error


@dataclass
class PolicySettings:
    """Which batch size a run should have next.

    Null for rounding, lr_scaling and theta is the policy's own value, which then takes its place.
    """

    policy: Annotated[str, key_of(POLICIES), About("what chooses the batch size")] = "constant"
    # down (the published runs) | up (Algorithm 1)
    rounding: Annotated[str | None, one_of(*ROUNDINGS), About("to a feasible size")] = None
    # null: the budget's rest
    cap: Annotated[
        int | None, at_least(1, "sequence", hint="or null"), About("sequences never exceeded")
    ] = None
    # sqrt (the paper's) | linear | none
    lr_scaling: Annotated[
        str | None, one_of(*LR_EXPONENTS), About("of the learning rate with the batch")
    ] = None
    # adaptive (Algorithm 1); the norm test reads theta and decide_every_steps too
    geometry: Annotated[str, key_of(GEOMETRIES), About("whose noise scale; measured")] = "manhattan"
    estimate: Annotated[str, About("plug_in (the paper's), debiased or cross_fitted")] = "plug_in"
    # a point of the geometry's gain curve: Appendix B
    target: Annotated[str, About("from noise scale to batch: theta, kappa or a point")] = "theta"
    # the paper's: 0.6 (Table 9: 0.3)
    theta: Annotated[
        float | None,
        positive(hint="the paper uses 0.6"),
        About("tolerated noise-to-signal ratio; eta of the norm test"),
    ] = None
    kappa: Annotated[  # Appendix B; theta 0.6's
        float,
        within(0, 1, exclusive=True, hint="a share of the largest gain; 0.16 is that of theta=0.6"),
        About("share of the largest gain of a step, for target kappa"),
    ] = 0.16
    price: Annotated[
        float,
        within(0, 0.29, exclusive=True, hint="1 - 1 / sqrt(2) = 0.293 is all there is to give up"),
        About("share of two steps' progress given up for one of twice the batch, for progress"),
    ] = 0.1
    # beta^N and beta^M; null: those of noise_scale.smoothing, whose averages are then followed
    noise_decay: Annotated[float | None, within(0, 1, hint="the paper uses 0.9")] = None
    signal_decay: Annotated[float | None, within(0, 1, hint="the paper uses 0.9")] = None
    # before each such step; the published runs' (F is their 100)
    decide_every_steps: Annotated[int, at_least(1, "step", hint="the published runs have 10")] = 10
    # I; the paper's
    warmup_fraction: Annotated[
        float,
        within(0, 1, hint="the paper uses 0.15"),
        About("of the sample budget, without a change"),
    ] = 0.15
    stage_tokens: Annotated[list[int], About("where each stage of staged begins")] = field(
        default_factory=list
    )
    stage_sizes: Annotated[list[int], About("sequences of each stage")] = field(
        default_factory=list
    )
    ramp_size: Annotated[int | None, About("sequences at the end of linear_ramp")] = None
    ramp_tokens: Annotated[int | None, About("tokens that linear_ramp takes")] = None
    growth: Annotated[
        float, at_least(1.0), About("factor of exponential, once each growth_tokens")
    ] = 2.0
    growth_tokens: Annotated[int | None, About("tokens between steps of exponential")] = None

    def __post_init__(self) -> None:
        """Fill in what was left to the policy."""
        if self.target == "inflection":
            self.target = RECORDED_INFLECTION
        for name, value in POLICIES.get(self.policy, Policy).own_values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def kind(self) -> "type[Policy]":
        return POLICIES[self.policy]

    @property
    def label(self) -> str:
        """The name of its averages and of its lines in the record."""
        return self.policy

    @property
    def reads(self) -> tuple[str, str] | None:
        """Geometry and estimate that must be measured for this policy; None if it needs none."""
        return self.kind.reads(self)

    @property
    def whole_sizes(self) -> list[tuple[str, int]]:
        """Sizes that the user names and that must be feasible, each after its setting."""
        given = [(name, getattr(self, name)) for name in ("cap", *self.kind.sizes)]
        return [
            (name, size)
            for name, value in given
            for size in (value if isinstance(value, list) else [value])
            if size is not None
        ]

    def check(self, prefix: str) -> None:
        """Check every setting, then those that depend on one another, then the policy's own.

        Raises:
            InputError: the first rule that is broken; the setting's name starts with `prefix`.
        """
        check_bounds(self, prefix)
        geometry = GEOMETRIES[self.geometry]
        for name, choices in (
            ("estimate", geometry.estimates),
            ("target", ("theta", "kappa", *geometry.targets)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InputError(
                    f"{setting_name(prefix, name)}={value} is not known for geometry "
                    f"{self.geometry}; use one of {', '.join(choices)}"
                )
        self.kind.check(self, prefix)


@dataclass(frozen=True)
class Position:
    """Where a run stands before a step."""

    step: int  # the coming one, from 1
    samples: int  # consumed before it: sequences, images
    tokens: int  # consumed before it; 0 where samples have none
    samples_left: float  # what the budget has left for it and all later ones; inf without a budget
    lr_decay: float = 1.0  # share of its peak that the learning rate has, after the peak
    step_time: StepTime | None = None  # of a policy that weighs seconds, once enough are known


class Policy(ABC):
    """Wants a batch size; which sizes the ranks can take is left to the controller.

    A subclass with a name of its own is registered.

    Args:
        settings: checked.
        initial_batch_size: B_0, samples.
        total_steps: S, steps that the budget takes at B_0; None without a budget.
    """

    name: ClassVar[str]
    changes: ClassVar[bool] = True  # whether the batch can ever change
    plans_in_tokens: ClassVar[bool] = False  # whether its settings count tokens
    unbounded: ClassVar[bool] = False  # whether no setting says how far it grows
    follows_schedule: ClassVar[bool] = False  # whether it reads how far the learning rate decayed
    weighs_seconds: ClassVar[bool] = False  # whether it reads how long a step takes
    sizes: ClassVar[tuple[str, ...]] = ()  # settings that are batch sizes of its plan
    named_by: ClassVar[tuple[str, ...]] = ()  # settings in the name of a shadow that has none
    # Where a setting is null: those of the published runs.
    own_values: ClassVar[Mapping[str, str | float]] = {
        "rounding": "down",
        "lr_scaling": "sqrt",
        "theta": 0.6,
    }

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            POLICIES[cls.name] = cls

    def __init__(
        self, settings: PolicySettings, *, initial_batch_size: int, total_steps: int | None
    ) -> None:
        assert settings.theta is not None
        self.settings = settings
        self.theta = settings.theta
        self.initial_batch_size = initial_batch_size
        self.total_steps = total_steps

    @abstractmethod
    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """Return the batch size that it wants for the coming step, in samples; None to keep it.

        Args:
            noise: averages of what it reads; None before the first measurement.
        """

    def basis(self, position: Position) -> str:
        """Return what a decision rests on beside noise scale and position, for its reason."""
        return ""

    def own_smoothing(self, shared: SmoothingSettings) -> SmoothingSettings | None:
        """Return how an average of its own is smoothed; None to follow the logged, `shared` one."""
        return None

    @classmethod
    def reads(cls, settings: PolicySettings) -> tuple[str, str] | None:
        """Return geometry and estimate of the noise scale that it reads; None if it reads none."""
        return None

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """Raise InputError for settings that this policy cannot use."""
        return  # most have no rule of their own

    @classmethod
    def note(cls, settings: PolicySettings) -> str | None:
        """Return what the user should know of the settings as the run starts, if anything."""
        return None


class Constant(Policy):
    """The batch size stays as it is."""

    name = "constant"
    changes = False

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        return None


class Adaptive(Policy):
    """The batch size follows the smoothed noise scale, once the warm-up is over (Algorithm 1).

    A decision is taken before every step that `decide_every_steps` divides, on the measurements so
    far. With decide_every_steps=10 and a measurement every F = 100 steps this is what the published
    runs did, to the last token: the measurement of step 3900 changes the batch of step 3910. With
    decide_every_steps=1 it changes that of the very next step, as Algorithm 1 is printed.
    """

    name = "adaptive"
    named_by: ClassVar[tuple[str, ...]] = ("geometry", "estimate", "target")

    def __init__(
        self, settings: PolicySettings, *, initial_batch_size: int, total_steps: int | None
    ) -> None:
        super().__init__(settings, initial_batch_size=initial_batch_size, total_steps=total_steps)
        fraction = settings.warmup_fraction
        if total_steps is None and fraction > 0:
            raise InputError(
                f"warmup_fraction={fraction:g} is a share of the budget, and total_samples is not "
                "given; give it, or use warmup_fraction=0"
            )
        self.warmup_samples = math.floor(fraction * (total_steps or 0)) * initial_batch_size

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """What the noise scale asks for (Eq. 7, or a target of Appendix B)."""
        if noise is None or position.step % self.settings.decide_every_steps:
            return None
        return self.wanted(position, noise) if position.samples >= self.warmup_samples else None

    def wanted(self, position: Position, noise: SmoothedNoiseScale) -> float | None:
        """The same, where a decision is due."""
        settings = self.settings
        if settings.target == "theta":
            return target_batch_size(noise.noise, noise.signal, theta=self.theta)
        if noise.noise_scale is None:
            return None
        geometry = GEOMETRIES[settings.geometry]
        if settings.target == "kappa":
            return geometry.fraction_batch(noise.noise_scale, kappa=settings.kappa)
        return geometry.targets[settings.target](noise.noise_scale)

    def own_smoothing(self, shared: SmoothingSettings) -> SmoothingSettings | None:
        """Its own decays; where it has only one, the shared one for the other."""
        noise, signal = self.settings.noise_decay, self.settings.signal_decay
        if noise is None and signal is None:
            return None
        return SmoothingSettings(
            noise_decay=shared.noise_decay if noise is None else noise,
            signal_decay=shared.signal_decay if signal is None else signal,
            bias_corrected=shared.bias_corrected,
        )

    @classmethod
    def reads(cls, settings: PolicySettings) -> tuple[str, str] | None:
        return settings.geometry, settings.estimate

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """The bend of a progress curve is not for theta: it may be infinite."""
        if settings.estimate == "nested":
            raise InputError(
                f"{setting_name(prefix, 'estimate')}=nested is read by "
                f"{setting_name(prefix, 'policy')}=progress, which needs no theta; use that, or "
                "another estimate"
            )

    @classmethod
    def note(cls, settings: PolicySettings) -> str | None:
        """What theta means where there is no gradient; None for what no theta governs."""
        theta, geometry = settings.theta, GEOMETRIES[settings.geometry]
        threshold = geometry.noise_alone_theta
        if settings.target != "theta" or theta is None or threshold is None:
            return None
        if settings.estimate in geometry.noise_alone_estimates:
            scale = f"the {settings.estimate} {settings.geometry} scale"
            if theta < threshold:
                return (
                    f"theta={theta:g} is below {threshold:.3f}: by {scale} the batch can grow from "
                    "noise alone; by estimate=cross_fitted, with theta 3 to 6, it cannot"
                )
            return (
                f"theta={theta:g}: by {scale} the batch cannot grow from noise alone, as it can "
                f"below theta = {threshold:.3f}"
            )
        if theta < 1.0:
            return None
        return (
            f"theta={theta:g} lies past Algorithm 1's (0, 1), as a {settings.estimate} scale may "
            f"need; the plug-in one can grow the batch from noise alone below {threshold:.3f}"
        )


class Goodput(Adaptive):
    """The batch of the largest expected progress per second (after goodput, arXiv:2008.12260).

        gain(B) / t(B)    gain of a step by the geometry's curve (Eq. 18), t(B) = a + b B seconds

    t is what the run's own steps took (`StepTimes`). Its line holds near the sizes it was drawn
    through, so a decision at most doubles the largest of them, and the next one waits until the new
    size has been timed. Decided when and on whose noise scale Algorithm 1 would; theta and target
    are not read. Without a fixed part a larger batch is never worth its seconds to SGD, and to sign
    and spectral steps up to 4 noise scales (Eq. 45).
    """

    name = "goodput"
    named_by = ("geometry", "estimate")
    weighs_seconds = True

    def wanted(self, position: Position, noise: SmoothedNoiseScale) -> float | None:
        """The top of the curve, or twice the largest batch that was timed."""
        time = position.step_time
        if time is None or noise.noise_scale is None:
            return None
        geometry = GEOMETRIES[self.settings.geometry]
        best = geometry.goodput_batch(noise.noise_scale, overhead=time.overhead)
        return min(best, 2.0 * time.sizes[-1])

    def basis(self, position: Position) -> str:
        """How long a step takes."""
        return f"; {position.step_time}"

    @classmethod
    def note(cls, settings: PolicySettings) -> str | None:
        """That such a run does not repeat, and where its noise scale follows the batch."""
        text = (
            f"policy={cls.name} decides by measured seconds: a resumed run goes on from those that "
            "it has saved, but two runs of one command may choose different batches"
        )
        if settings.estimate not in GEOMETRIES[settings.geometry].noise_alone_estimates:
            return text
        scale = f"the {settings.estimate} {settings.geometry} scale"
        if settings.geometry == "euclidean":
            return f"{text}; {scale} reads no more than its own batch: use estimate=debiased"
        return f"{text}; by {scale} the batch can grow from noise alone"


class Progress(Adaptive):
    """The batch grows while a larger one is seen to gain enough, and needs no theta.

    What steps of an eighth, a quarter and half of the batch gain gives the curve P(n) of
    `equations.progress_curve`, and with it the share of their progress that two steps of B give up
    where one step of 2 B takes their place. `price` is the largest share that the user gives for
    half the steps: the batch is the largest one whose share, with its standard error on top, does
    not exceed it. In one decision it goes to twice the measured batch at most, as far as the curve
    is trusted.
    """

    name = "progress"
    named_by = ("geometry", "price")

    def wanted(self, position: Position, noise: SmoothedNoiseScale) -> float | None:
        """The largest batch that the price pays for; None where it pays for no growth."""
        assert isinstance(noise, SmoothedProgress)
        if len(noise.bends_without_one) < FEWEST_MEASUREMENTS:
            return None
        for tenth in range(10, 0, -1):
            size = noise.batch_size * 2.0 ** (tenth / 10)
            share, error = noise.share_given_up(size)
            if share + error <= self.settings.price:
                return size
        return None

    @classmethod
    def reads(cls, settings: PolicySettings) -> tuple[str, str] | None:
        return settings.geometry, "nested"

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """Nothing beyond the bounds."""

    @classmethod
    def note(cls, settings: PolicySettings) -> str | None:
        """None: there is no theta."""
        return None


class Staged(Policy):
    """Batch sizes by plan, each from the first step at or after its tokens: a baseline."""

    name = "staged"
    plans_in_tokens = True
    sizes = ("stage_sizes",)

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size of the stage that the run has reached; None before the first threshold."""
        stages = zip(self.settings.stage_tokens, self.settings.stage_sizes, strict=True)
        reached = [size for tokens, size in stages if position.tokens >= tokens]
        return reached[-1] if reached else None

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """Tokens and sizes of the stages rise, as many of the one as of the other."""
        tokens, sizes = settings.stage_tokens, settings.stage_sizes
        rising = all(a < b for values in ([0, *tokens], sizes) for a, b in pairwise(values))
        if not tokens or len(tokens) != len(sizes) or not rising:
            raise InputError(
                f"{setting_name(prefix, 'stage_tokens')}={tokens} and "
                f"{setting_name(prefix, 'stage_sizes')}={sizes} must both rise and be of one "
                "length, as in stage_tokens=[500000,1000000] stage_sizes=[32,64]"
            )


class LinearRamp(Policy):
    """From the initial size to the last one in proportion to the tokens seen: a baseline."""

    name = "linear_ramp"
    plans_in_tokens = True
    sizes = ("ramp_size",)

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size on the line."""
        size, tokens = self.settings.ramp_size, self.settings.ramp_tokens
        assert size is not None
        assert tokens is not None
        progress = min(position.tokens / tokens, 1.0)
        return self.initial_batch_size + (size - self.initial_batch_size) * progress

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """Size and tokens are given."""
        for name in ("ramp_size", "ramp_tokens"):
            value = getattr(settings, name)
            if value is None or value < 1:
                raise InputError(
                    f"{setting_name(prefix, name)}={'null' if value is None else value} must be at "
                    f"least 1 for {setting_name(prefix, 'policy')}=linear_ramp; name the ramp's "
                    "last size and its tokens"
                )


class Exponential(Policy):
    """The batch multiplied by `growth` each `growth_tokens` (arXiv:2508.05297), a baseline.

        B = B_0 growth^floor(tokens / growth_tokens)

    The learning rate grows with it as `lr_scaling` says, which for SGD must not exceed sqrt.
    """

    name = "exponential"
    plans_in_tokens = True
    unbounded = True

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size after so many periods; inf where floating point has no larger one."""
        period = self.settings.growth_tokens
        assert period is not None
        try:
            return self.initial_batch_size * self.settings.growth ** (position.tokens // period)
        except OverflowError:
            return math.inf

    @classmethod
    def check(cls, settings: PolicySettings, prefix: str) -> None:
        """The period is given."""
        if settings.growth_tokens is None or settings.growth_tokens < 1:
            value = "null" if settings.growth_tokens is None else settings.growth_tokens
            raise InputError(
                f"{setting_name(prefix, 'growth_tokens')}={value} must be at least 1 for "
                f"{setting_name(prefix, 'policy')}=exponential; give the tokens between two steps"
            )


class Seesaw(Policy):
    """The batch grows as the learning rate would fall (Seesaw, arXiv:2510.14717), a baseline.

    Where a schedule cuts the learning rate by a, Seesaw cuts it by sqrt(a) and multiplies the batch
    by 1 / a, which to SGD with normalized steps is the same risk at the same samples in fewer
    steps. Here in the limit of many small cuts, with f the decay of the schedule after its peak:

        B = B_0 / f,    learning rate = peak f sqrt(B / B_0) = peak sqrt(f)    (lr_scaling: sqrt)

    Rounded down to a feasible size: between two sizes the learning rate falls as f does. Plain SGD
    has the schedule's risk with lr_scaling linear, which leaves the rate at its peak.
    """

    name = "seesaw"
    follows_schedule = True
    unbounded = True

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size at this point of the schedule; inf where it has come to zero."""
        decay = position.lr_decay
        return self.initial_batch_size / decay if decay > 0.0 else math.inf


class NormTest(Policy):
    """The norm test of AdAdaGrad (arXiv:2402.11215), a baseline.

    The batch grows when its gradient's variance is too large for its gradient's norm:

        passed: tr C / B <= eta^2 ||g||_2^2        failed: B = tr C / (eta^2 ||g||_2^2)

    eta is `theta`. The size after a failed test is Eq. 7 of the Euclidean noise scale, from the
    last measurement alone and without a warm-up; a test before every step that `decide_every_steps`
    divides. Rounding up and the learning rate left alone are the test's, its theta is ours.
    """

    name = "norm_test"
    named_by = ("theta",)
    own_values: ClassVar[Mapping[str, str | float]] = {
        "rounding": "up",
        "lr_scaling": "none",
        "theta": 0.3,
    }

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The smallest batch that would have passed the test."""
        if noise is None or position.step % self.settings.decide_every_steps:
            return None
        return target_batch_size(noise.noise, noise.signal, theta=self.theta)

    def own_smoothing(self, shared: SmoothingSettings) -> SmoothingSettings | None:
        """The test looks at one step's gradients: nothing is averaged."""
        return SmoothingSettings(noise_decay=0.0, signal_decay=0.0)

    @classmethod
    def reads(cls, settings: PolicySettings) -> tuple[str, str] | None:
        return "euclidean", "plug_in"
