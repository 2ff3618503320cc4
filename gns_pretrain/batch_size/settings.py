"""Settings of the batch size: the policy that is followed, and those that are only logged."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.critical_batch import NOISE_ALONE_THETA
from gns_pretrain.noise_scale.geometries import ESTIMATES

# Settings of a policy that changes the batch size.
#
# One flat set of settings serves every policy, and each policy reads its own: what depends on the
# size of an experiment can then be set whatever the role of a run in it.

POLICIES = ("constant", "adaptive", "staged", "linear_ramp", "norm_test")
ROUNDINGS = ("down", "up")
LR_SCALINGS = ("sqrt", "linear", "none")
DUAL_NORM_TARGETS = ("inflection", "corrected_inflection", "maximum_efficiency")
TARGETS = ("theta", "kappa", *DUAL_NORM_TARGETS)

# What a policy has where a setting is null: the published runs' values, and the norm test's own.
# Rounding up and the learning rate left alone are the test's, its theta (eta) is ours.
OWN_VALUES = {"rounding": "down", "lr_scaling": "sqrt", "theta": 0.6}
OWN_VALUES_OF_NORM_TEST = {"rounding": "up", "lr_scaling": "none", "theta": 0.3}


@dataclass
class PolicySettings:
    """Which batch size a run should have next.

    Null for rounding, lr_scaling and theta is the policy's own value, which then takes its place.
    """

    policy: str = "constant"  # constant | adaptive | staged | linear_ramp | norm_test
    rounding: str | None = None  # to a feasible size: down (the published runs) | up (Algorithm 1)
    cap: int | None = None  # sequences, feasible, that no decision exceeds; null: the budget's rest
    lr_scaling: str | None = None  # of lr with the batch: sqrt (the paper's) | linear | none
    # adaptive (Algorithm 1); the norm test reads theta and decide_every_steps too
    geometry: str = "manhattan"  # whose noise scale; it has to be measured
    estimate: str = "plug_in"  # plug_in (the paper's) | debiased | cross_fitted
    target: str = "theta"  # theta | kappa | inflection | corrected_inflection | maximum_efficiency
    theta: float | None = None  # tolerated noise-to-signal ratio; the paper's: 0.6 (Table 9: 0.3)
    kappa: float = 0.16  # share of the largest gain of a step (Appendix B); theta 0.6's
    noise_decay: float | None = None  # beta^N; null: noise_scale.smoothing.noise_decay
    signal_decay: float | None = None  # beta^M; null: noise_scale.smoothing.signal_decay
    decide_every_steps: int = 10  # before each such step; the published runs' (F is their 100)
    warmup_fraction: float = 0.15  # I, of the sample budget, without a change; the paper's
    # staged
    stage_tokens: list[int] = field(default_factory=list)  # from so many tokens on,
    stage_sizes: list[int] = field(default_factory=list)  # so many sequences
    # linear_ramp
    ramp_size: int | None = None  # sequences at its end; it begins at batch_size.initial
    ramp_tokens: int | None = None  # its length in tokens

    def __post_init__(self) -> None:
        """Fill in what was left to the policy."""
        own = OWN_VALUES_OF_NORM_TEST if self.policy == "norm_test" else OWN_VALUES
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def threshold_note(self) -> str | None:
        """What theta means where there is no gradient; None for what no theta governs."""
        if self.policy != "adaptive" or self.target != "theta":
            return None
        assert self.theta is not None
        threshold = NOISE_ALONE_THETA[self.geometry]
        reads_noise = self.estimate == "plug_in" or self.geometry == "manhattan"
        if reads_noise and self.estimate != "cross_fitted":
            can = "can" if self.theta < threshold else "cannot"
            return (
                f"theta={self.theta:g}: the batch {can} grow from noise alone; without a true "
                f"gradient the {self.estimate} {self.geometry} scale asks for more than the batch "
                f"below theta = {threshold:.3f} (many samples)"
            )
        if self.theta < 1.0:
            return None
        return (
            f"theta={self.theta:g} lies past Algorithm 1's (0, 1), as a {self.estimate} scale may "
            f"need; the plug-in one can grow the batch from noise alone below {threshold:.3f}"
        )

    @property
    def reads(self) -> tuple[str, str] | None:
        """Geometry and estimate that must be measured for this policy; None if it needs none."""
        if self.policy == "adaptive":
            return self.geometry, self.estimate
        return ("euclidean", "plug_in") if self.policy == "norm_test" else None

    @property
    def whole_sizes(self) -> list[tuple[str, int]]:
        """Sizes that people name and that must be feasible, each after its setting."""
        sizes = [("cap", self.cap)]
        if self.policy == "staged":
            sizes += [("stage_sizes", size) for size in self.stage_sizes]
        if self.policy == "linear_ramp":
            sizes.append(("ramp_size", self.ramp_size))
        return [(name, size) for name, size in sizes if size is not None]

    def check(self, prefix: str) -> None:
        """Check each setting by itself.

        Args:
            prefix: of the settings' names, as people type them.

        Raises:
            InputError: the first rule that is broken.
        """
        for name, choices in (
            ("policy", POLICIES),
            ("rounding", ROUNDINGS),
            ("lr_scaling", LR_SCALINGS),
            ("geometry", tuple(ESTIMATES)),
            ("estimate", ESTIMATES.get(self.geometry, ())),
            ("target", TARGETS),
        ):
            if (value := getattr(self, name)) not in choices:
                of_geometry = f" for geometry {self.geometry}" if name == "estimate" else ""
                raise InputError(
                    f"{prefix}.{name}={value} is not known{of_geometry}; "
                    f"use one of {', '.join(choices)}"
                )
        self._check_numbers(prefix)
        self._check_plans(prefix)

    def _check_numbers(self, prefix: str) -> None:
        """Ranges of the adaptive policy's numbers, and what its target needs."""
        if self.theta is None or not 0.0 < self.theta < math.inf:
            raise InputError(
                f"{prefix}.theta={self.theta} must be positive and finite; the paper uses 0.6"
            )
        if not 0.0 < self.kappa < 1.0:
            raise InputError(
                f"{prefix}.kappa={self.kappa} is a share of the largest gain and lies between "
                "0 and 1 (exclusive); 0.16 is that of theta=0.6"
            )
        for name in ("noise_decay", "signal_decay"):
            decay = getattr(self, name)
            if decay is not None and not 0.0 <= decay < 1.0:
                raise InputError(
                    f"{prefix}.{name}={decay} must be at least 0 and below 1; the paper uses 0.9"
                )
        if self.decide_every_steps < 1:
            raise InputError(
                f"{prefix}.decide_every_steps={self.decide_every_steps} must be at least 1 step; "
                "the published runs have 10"
            )
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise InputError(
                f"{prefix}.warmup_fraction={self.warmup_fraction} leaves no sequence of the budget "
                "to the policy: use at least 0 and below 1; the paper uses 0.15"
            )
        if self.geometry == "euclidean" and self.target in DUAL_NORM_TARGETS:
            raise InputError(
                f"{prefix}.target={self.target} does not exist for geometry euclidean, whose gain "
                f"has no such point; use {prefix}.target=theta or kappa"
            )
        if self.cap is not None and self.cap < 1:
            raise InputError(f"{prefix}.cap={self.cap} must be at least 1 sequence, or null")

    def _check_plans(self, prefix: str) -> None:
        """Stages and ramp, where the policy is one."""
        tokens, sizes = self.stage_tokens, self.stage_sizes
        if self.policy == "staged" and (
            not tokens or not rises([0, *tokens]) or len(tokens) != len(sizes) or not rises(sizes)
        ):
            raise InputError(
                f"{prefix}.stage_tokens={tokens} and {prefix}.stage_sizes={sizes} must both rise "
                "and be of one length, as in stage_tokens=[500000,1000000] stage_sizes=[32,64]"
            )
        for name in ("ramp_size", "ramp_tokens"):
            value = getattr(self, name)
            if self.policy == "linear_ramp" and (value is None or value < 1):
                raise InputError(
                    f"{prefix}.{name}={'null' if value is None else value} must be at least 1 for "
                    f"{prefix}.policy=linear_ramp; name the ramp's last size and its tokens"
                )


def rises(values: list[int]) -> bool:
    """Whether each value is larger than the one before it."""
    return all(before < after for before, after in pairwise(values))


@dataclass
class ShadowSettings(PolicySettings):
    """A policy that only says what it would have chosen."""

    policy: str = "adaptive"
    name: str | None = None  # in the record; null: made of policy, geometry, estimate and target

    @property
    def label(self) -> str:
        """The name it goes by."""
        if self.name is not None:
            return self.name
        if self.policy == "adaptive":
            value = {"theta": f"_{self.theta}", "kappa": f"_{self.kappa}"}.get(self.target, "")
            return f"adaptive_{self.geometry}_{self.estimate}_{self.target}{value}"
        return f"norm_test_{self.theta}" if self.policy == "norm_test" else self.policy


@dataclass
class BatchSizeSettings(PolicySettings):
    """How many sequences an optimizer step takes, at first and later."""

    initial: int = 16  # sequences, over all ranks
    micro_batch_max: int | None = None  # largest micro-batch; null: micro_batch_size, always
    micro_batch_step: int = 1  # sequences by which the micro-batch grows to its largest
    shadows: list[ShadowSettings] = field(default_factory=list)  # logged, never followed

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        super().__post_init__()
        self.check("batch_size")
        if self.initial < 1:
            raise InputError(
                f"batch_size.initial={self.initial} must be at least 1 sequence; "
                "it counts the sequences of one optimizer step over all ranks"
            )
        for name in ("micro_batch_max", "micro_batch_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"batch_size.{name}={value} must be at least 1 sequence")
        policies: list[tuple[str, PolicySettings]] = [("batch_size", self)]
        for number, shadow in enumerate(self.shadows):
            policies.append((f"batch_size.shadows[{number}]", shadow))
            shadow.check(policies[-1][0])
        for prefix, policy in policies:
            for name, size in policy.whole_sizes:
                if size < self.initial:
                    way_out = "raise the cap, or use null for none" if name == "cap" else "raise it"
                    raise InputError(
                        f"{prefix}.{name}={size} is below batch_size.initial={self.initial}; a "
                        f"batch never shrinks: {way_out}"
                    )
        labels = [self.policy, *(shadow.label for shadow in self.shadows)]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(
                    f"batch_size has the policy {label} more than once; give a shadow another "
                    "name, as in {policy: adaptive, theta: 0.5, name: patient}"
                )

    def sizes_for(
        self, policy: PolicySettings, *, num_ranks: int, micro_batch_size: int, min_samples: int
    ) -> FeasibleSizes:
        """The batch sizes that ranks can take under a policy.

        Args:
            policy: this one or a shadow; a constant batch has constant micro-batches, and needs no
                samples.
            num_ranks: data-parallel ranks.
            micro_batch_size: sequences of the smallest micro-batch.
            min_samples: micro-batches of a step at least, where the batch may change.

        Raises:
            InputError: the largest micro-batch is below the smallest.
        """
        if policy.policy == "constant":
            return FeasibleSizes(num_ranks, micro_batch_size, micro_batch_size)
        if self.micro_batch_max is not None and self.micro_batch_max < micro_batch_size:
            raise InputError(
                f"batch_size.micro_batch_max={self.micro_batch_max} is below micro_batch_size="
                f"{micro_batch_size}, from which it grows; raise it, or use null to hold the shape"
            )
        return FeasibleSizes(
            num_ranks=num_ranks,
            micro_batch_size=micro_batch_size,
            micro_batch_max=self.micro_batch_max or micro_batch_size,
            micro_batch_step=self.micro_batch_step,
            min_samples=min_samples,
        )
