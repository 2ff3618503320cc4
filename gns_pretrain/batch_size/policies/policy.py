"""What every policy is: where a run stands and what was measured in, a wanted batch size out."""

from dataclasses import dataclass
from typing import Protocol

from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale, SmoothingSettings


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
