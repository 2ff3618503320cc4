"""Where a run stands: what changes and is neither weight, optimizer state nor average."""

from dataclasses import dataclass, fields
from typing import Any

from gns_pretrain.batch_size.feasible import Split


@dataclass
class TrainState:
    """Position of a run, counted, never computed from steps: the batch size changes.

    `samples` is also the data cursor: the next step starts at that sequence of the run's order.
    """

    batch_size: int  # sequences per optimizer step
    micro_batch_size: int  # sequences per micro-batch and rank
    accumulation: int = 1  # micro-batches of each rank per optimizer step
    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences consumed
    tokens: int = 0  # tokens predicted
    lr_multiplier: float = 1.0  # from the batch size, on top of the schedule

    @classmethod
    def before_first_step(cls, split: Split) -> "TrainState":
        """The state of a run that has not begun."""
        return cls(split.batch_size, split.micro_batch_size, split.accumulation)

    def advance(self, *, sequence_length: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.samples += self.batch_size
        self.tokens += self.batch_size * sequence_length

    def take(self, split: Split, *, lr_multiplier: float) -> None:
        """Split the coming steps another way."""
        self.batch_size = split.batch_size
        self.micro_batch_size = split.micro_batch_size
        self.accumulation = split.accumulation
        self.lr_multiplier = lr_multiplier

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Inverse of `asdict`, through JSON too; other entries are left alone."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def crossed(every: int, *, before: int, after: int) -> bool:
    """Whether a counter that went from `before` to `after` passed a multiple of `every`."""
    return before // every != after // every
