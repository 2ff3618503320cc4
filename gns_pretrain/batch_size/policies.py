"""Policies, one small class each, and how settings become one of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from gns_pretrain.batch_size.settings import PolicySettings
from gns_pretrain.noise_scale.critical_batch import (
    corrected_inflection_batch,
    dual_norm_fraction_batch,
    euclidean_fraction_batch,
    inflection_batch,
    maximum_efficiency_batch,
    target_batch_size,
)
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale, SmoothingSettings

# What every policy is: where a run stands and what was measured in, a wanted batch size out.


@dataclass(frozen=True)
class Position:
    """Where a run stands before a step.

    Args:
        step: the coming step, from 1.
        samples: sequences consumed before it.
        tokens: tokens consumed before it.
        sequences_left: what the budget has left for it and all later ones, rounded up.
    """

    step: int
    samples: int
    tokens: int
    sequences_left: int

    @classmethod
    def after(
        cls, steps: int, *, samples: int, tokens: int, token_budget: int, sequence_length: int
    ) -> "Position":
        """The position after some steps, sequences and tokens of a budget in tokens."""
        return cls(steps + 1, samples, tokens, -((tokens - token_budget) // sequence_length))


@dataclass(frozen=True)
class NoiseSource:
    """Which noise scale a policy reads, and how it is averaged for this policy."""

    geometry: str
    estimate: str
    smoothing: SmoothingSettings


class Policy(Protocol):
    """Wants a batch size; what ranks can take of it is not its business."""

    @property
    def source(self) -> NoiseSource | None:
        """The noise scale that it reads; None if it reads none."""

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The batch size that it wants for the coming step, in sequences.

        Args:
            position: of the run.
            noise: averages of its source; None before the first measurement.

        Returns:
            None where it takes no decision: the batch stays as it is.
        """


# The adaptive batch size (arXiv:2602.03001, Algorithm 1).


@dataclass(frozen=True)
class Adaptive:
    """The batch size follows the smoothed noise scale, once the warm-up is over.

    A decision is taken before every step that `every_steps` divides, on the measurements so far.
    With every_steps=10 and a measurement every F = 100 steps this is what the published runs did,
    to the last token: the measurement of step 3900 changes the batch of step 3910. With
    every_steps=1 it changes that of the very next step, as Algorithm 1 is printed.

    Args:
        source: the noise scale it reads.
        wanted: the batch size that a noise scale asks for; None where it has no signal.
        every_steps: decision interval.
        warmup_samples: I, sequences that must have been consumed before a change.
    """

    source: NoiseSource
    wanted: Callable[[SmoothedNoiseScale], float | None]
    every_steps: int
    warmup_samples: int

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """What the noise scale asks for (Eq. 7, or a target of Appendix B)."""
        if noise is None or position.step % self.every_steps:
            return None
        return None if position.samples < self.warmup_samples else self.wanted(noise)


# The batch size stays as it is.


@dataclass(frozen=True)
class Constant:
    """Never wants anything."""

    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """No decision, ever."""
        return None


# A batch size that grows in proportion to the tokens seen, a baseline.


@dataclass(frozen=True)
class LinearRamp:
    """From the initial size to the last one over the first tokens of a run.

    Args:
        initial: sequences a step at the beginning.
        size: sequences a step from the ramp's end on.
        tokens: length of the ramp.
    """

    initial: int
    size: int
    tokens: int
    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size on the line."""
        progress = min(position.tokens / self.tokens, 1.0)
        return self.initial + (self.size - self.initial) * progress


# The norm test of AdAdaGrad (arXiv:2402.11215), a baseline.

# The test looks at one step's gradients: nothing is averaged.
LAST_MEASUREMENT = NoiseSource(
    "euclidean", "plug_in", SmoothingSettings(noise_decay=0.0, signal_decay=0.0)
)


@dataclass(frozen=True)
class NormTest:
    """The batch grows when its gradient's variance is too large for its gradient's norm.

        passed: tr C / B <= eta^2 ||g||_2^2        failed: B = tr C / (eta^2 ||g||_2^2)

    The size after a failed test is Eq. 7 of the Euclidean noise scale, from the last measurement
    alone and without a warm-up.

    Args:
        eta: tolerated noise-to-signal ratio of the gradient.
        every_steps: a test before every step that this divides.
    """

    eta: float
    every_steps: int
    source: NoiseSource = LAST_MEASUREMENT

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The smallest batch that would have passed the test."""
        if noise is None or position.step % self.every_steps:
            return None
        return target_batch_size(noise.noise, noise.signal, theta=self.eta)


# Batch sizes by plan, a stage after the other, a baseline.


@dataclass(frozen=True)
class Staged:
    """Each stage begins with the first step that starts at or after its tokens.

    Args:
        tokens: thresholds, rising.
        sizes: sequences a step from each threshold on, rising.
    """

    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size of the stage that the run has reached; None before the first threshold."""
        reached = [
            size
            for tokens, size in zip(self.tokens, self.sizes, strict=True)
            if position.tokens >= tokens
        ]
        return reached[-1] if reached else None


__all__ = ["NoiseSource", "Policy", "Position", "make_policy"]


def make_policy(
    settings: PolicySettings,
    *,
    initial_batch_size: int,
    total_steps: int,
    smoothing: SmoothingSettings,
) -> Policy:
    """A policy out of its settings.

    Args:
        settings: checked.
        initial_batch_size: B_0, sequences.
        total_steps: S, steps that the token budget takes at B_0.
        smoothing: of the noise scale, where the policy has no decays of its own.
    """
    if settings.policy == "adaptive":
        own = SmoothingSettings(
            noise_decay=first_given(settings.noise_decay, smoothing.noise_decay),
            signal_decay=first_given(settings.signal_decay, smoothing.signal_decay),
            bias_corrected=smoothing.bias_corrected,
        )
        return Adaptive(
            source=NoiseSource(settings.geometry, settings.estimate, own),
            wanted=partial(wanted_batch_size, settings=settings),
            every_steps=settings.decide_every_steps,
            warmup_samples=math.floor(settings.warmup_fraction * total_steps) * initial_batch_size,
        )
    if settings.policy == "norm_test":
        assert settings.theta is not None
        return NormTest(eta=settings.theta, every_steps=settings.decide_every_steps)
    if settings.policy == "staged":
        return Staged(tuple(settings.stage_tokens), tuple(settings.stage_sizes))
    if settings.policy == "linear_ramp":
        assert settings.ramp_size is not None
        assert settings.ramp_tokens is not None
        return LinearRamp(initial_batch_size, settings.ramp_size, settings.ramp_tokens)
    return Constant()


def wanted_batch_size(noise: SmoothedNoiseScale, settings: PolicySettings) -> float | None:
    """The batch size that a noise scale asks for (Eqs. 7, 19, 43, 45), in sequences.

    Returns:
        None while the signal is not positive.
    """
    if settings.target == "theta":
        assert settings.theta is not None
        return target_batch_size(noise.noise, noise.signal, theta=settings.theta)
    if noise.noise_scale is None:
        return None
    fraction = (
        euclidean_fraction_batch if settings.geometry == "euclidean" else dual_norm_fraction_batch
    )
    rules: dict[str, Callable[[float], float]] = {
        "kappa": partial(fraction, kappa=settings.kappa),
        "inflection": inflection_batch,
        "corrected_inflection": corrected_inflection_batch,
        "maximum_efficiency": maximum_efficiency_batch,
    }
    return rules[settings.target](noise.noise_scale)


def first_given(value: float | None, otherwise: float) -> float:
    """`value`, unless it was left to `otherwise`."""
    return otherwise if value is None else value
