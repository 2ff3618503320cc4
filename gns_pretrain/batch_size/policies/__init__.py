"""Policies, one small class each, and how settings become one of them."""

import math
from collections.abc import Callable
from functools import partial

from gns_pretrain.batch_size.policies.adaptive import Adaptive
from gns_pretrain.batch_size.policies.constant import Constant
from gns_pretrain.batch_size.policies.linear_ramp import LinearRamp
from gns_pretrain.batch_size.policies.norm_test import NormTest
from gns_pretrain.batch_size.policies.policy import NoiseSource, Policy, Position
from gns_pretrain.batch_size.policies.staged import Staged
from gns_pretrain.batch_size.policy_settings import PolicySettings
from gns_pretrain.noise_scale.critical_batch import (
    corrected_inflection_batch,
    dual_norm_fraction_batch,
    euclidean_fraction_batch,
    inflection_batch,
    maximum_efficiency_batch,
    target_batch_size,
)
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale, SmoothingSettings

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
