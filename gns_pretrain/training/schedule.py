"""The learning rate as a function of sequences consumed: it does not move when the batch does."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, at_most, key_of, one_of, positive, within

# What is left of the peak at a share p of the decay.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "sqrt": lambda p: 1.0 - math.sqrt(p),  # Haegele et al. 2024, arXiv:2405.18392
    "cosine": lambda p: (1.0 + math.cos(math.pi * p)) / 2.0,
}


@dataclass
class ScheduleSettings(Settings):
    """Shape of the learning rate over the run; the peak itself is `optimizer.lr`."""

    section: ClassVar[str] = "schedule"

    # after a linear warm-up; wsd: constant, then a decay over the last decay_fraction
    kind: Annotated[str, one_of("cosine", "constant", "wsd")] = "cosine"
    # of the token budget; the paper's value
    warmup_fraction: Annotated[float, within(0, 1, hint="0.15 is the paper's value")] = 0.15
    # of the peak, at the end of the decay; the paper's value
    final_fraction: Annotated[
        float, at_least(0, hint="0 lets the learning rate end at zero"), at_most(1)
    ] = 0.0
    # in place of final_fraction: the learning rate at the end; null: the fraction holds
    final_lr: Annotated[float | None, positive()] = None
    # of the token budget, for wsd
    decay_fraction: Annotated[float, within(0, 1, hint="0.1 to 0.2 is usual")] = 0.2
    decay_form: Annotated[str, key_of(DECAYS)] = "linear"  # of wsd

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise InputError(
                f"schedule.warmup_fraction={self.warmup_fraction:g} and schedule.decay_fraction="
                f"{self.decay_fraction:g} are more than the whole budget; lower one"
            )


@dataclass(frozen=True)
class Schedule:
    """Learning rate relative to its peak.

    Time is counted in virtual steps: the step at which a run that kept its initial batch would be.

        v = sequences consumed before this step / B_0 + 1
        W = floor(warmup_fraction * S)
        factor(v) = v / W                                        for v <= W
                  = (1 + cos(pi (v - W - 1) / (S - W - 1))) / 2  after it

    This is the form that reproduces the learning rates of the published runs (arXiv:2602.03001,
    Section 4.2 and Figure 3) with S = 24,415 and B_0 = 64. With `wsd` the factor is 1 up to step
    D = S - floor(decay_fraction * S), and decays over (v - D) / (S - D) after it: a run that goes
    on from a checkpoint at its budget's D is the decay branch of a longer one.
    """

    settings: ScheduleSettings
    initial_batch_size: int  # B_0, in sequences
    total_steps: int  # S, steps that the token budget takes at B_0

    @property
    def warmup_steps(self) -> int:
        """W, in steps of the initial batch size."""
        return math.floor(self.settings.warmup_fraction * self.total_steps)

    def factor(self, sequences_seen: int) -> float:
        """Learning rate over its peak for the step that starts after `sequences_seen` sequences."""
        virtual_step = sequences_seen / self.initial_batch_size + 1
        if virtual_step <= self.warmup_steps:
            return virtual_step / self.warmup_steps
        if self.settings.kind == "constant":
            return 1.0
        form, at_peak = "cosine", self.warmup_steps + 1
        if self.settings.kind == "wsd":
            decaying = math.floor(self.settings.decay_fraction * self.total_steps)
            form, at_peak = self.settings.decay_form, self.total_steps - decaying
            virtual_step = max(virtual_step, at_peak)
        decay_steps = max(self.total_steps - at_peak, 1)
        progress = min((virtual_step - at_peak) / decay_steps, 1.0)
        final = self.settings.final_fraction
        return final + (1.0 - final) * DECAYS[form](progress)

    def decay(self, sequences_seen: int) -> float:
        """Factor once the warm-up is over, for a batch size that follows it; 1 before."""
        virtual_step = sequences_seen / self.initial_batch_size + 1
        return self.factor(sequences_seen) if virtual_step > self.warmup_steps else 1.0


def steps_in_budget(token_budget: int, *, batch_size: int, sequence_length: int) -> int:
    """Steps at a constant batch until the first whole step that reaches the budget (tokens)."""
    return math.ceil(token_budget / (batch_size * sequence_length))
