"""The learning rate as a function of sequences consumed: it does not move when the batch does."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from gns_pretrain.fields import Settings, at_least, at_most, one_of, within


@dataclass
class ScheduleSettings(Settings):
    """Shape of the learning rate over the run; the peak itself is `optimizer.lr`."""

    section: ClassVar[str] = "schedule"

    kind: Annotated[str, one_of("cosine", "constant")] = "cosine"  # after a linear warm-up
    # of the token budget; the paper's value
    warmup_fraction: Annotated[float, within(0, 1, hint="0.15 is the paper's value")] = 0.15
    # of the peak, at the end of the cosine; the paper's value
    final_fraction: Annotated[
        float, at_least(0, hint="0 lets the learning rate end at zero"), at_most(1)
    ] = 0.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate relative to its peak.

    Time is counted in virtual steps: the step at which a run that kept its initial batch would be.

        v = sequences consumed before this step / B_0 + 1
        W = floor(warmup_fraction * S)
        factor(v) = v / W                                        for v <= W
                  = (1 + cos(pi (v - W - 1) / (S - W - 1))) / 2  after it

    This is the form that reproduces the learning rates of the published runs (arXiv:2602.03001,
    Section 4.2 and Figure 3) with S = 24,415 and B_0 = 64.
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
        decay_steps = max(self.total_steps - self.warmup_steps - 1, 1)
        progress = min((virtual_step - self.warmup_steps - 1) / decay_steps, 1.0)
        final = self.settings.final_fraction
        return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def steps_in_budget(token_budget: int, *, batch_size: int, sequence_length: int) -> int:
    """Steps at a constant batch until the first whole step that reaches the budget (tokens)."""
    return math.ceil(token_budget / (batch_size * sequence_length))
