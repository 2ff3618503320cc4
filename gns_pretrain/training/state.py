"""Everything about a run that changes and is neither a weight nor optimizer state."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Position of a run, counted, never computed from steps: the batch size changes.

    `samples` is also the data cursor: the next step starts at that sequence of the run's order.
    """

    batch_size: int  # sequences per optimizer step
    micro_batch_size: int  # sequences per micro-batch and rank
    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences consumed
    tokens: int = 0  # tokens predicted
    lr_multiplier: float = 1.0  # from the batch size, on top of the schedule
    recent_noise_scales: dict[str, list[float]] = field(default_factory=dict)  # newest last
    averages: dict[str, dict[str, float]] = field(default_factory=dict)  # noise and signal
    shadow_batch_sizes: dict[str, int] = field(default_factory=dict)  # of policies only logged

    def advance(self, *, sequences: int, sequence_length: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.samples += sequences
        self.tokens += sequences * sequence_length

    def change_batch_size(
        self, batch_size: int, *, micro_batch_size: int, lr_multiplier: float
    ) -> None:
        """Take another number of sequences from the coming step on."""
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.lr_multiplier = lr_multiplier

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file; floats survive exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Inverse of `as_dict`."""
        return cls(**values)


def crossed(every: int, *, before: int, after: int) -> bool:
    """Whether a counter that went from `before` to `after` passed a multiple of `every`."""
    return before // every != after // every
