"""The lines of metrics.jsonl, a class for each kind: the only place that names their fields."""

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line; its fields are written in the order in which they stand here."""

    kind: ClassVar[str]
    step: int  # from 1; 0 before the first

    def as_record(self) -> dict[str, Any]:
        """The object that is written."""
        return {"kind": self.kind, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class TrainLine(Line):
    """One optimizer step."""

    kind = "train"
    samples: int  # sequences consumed so far
    tokens: int  # consumed so far
    loss: float  # mean negative log-likelihood of the step's batch, nats per token
    lr: float
    grad_norm: float  # Euclidean, of the whole gradient, before clipping
    batch_size: int  # sequences over all ranks
    micro_batch_size: int  # sequences of one micro-batch on one rank
    accumulation: int  # micro-batches on each rank
    step_seconds: float  # wall time
    tokens_per_second: float  # of all ranks


@dataclass(frozen=True, kw_only=True)
class ValidationLine(Line):
    """An evaluation after `step` steps."""

    kind = "validation"
    tokens: int  # consumed so far
    loss: float  # nats per token


@dataclass(frozen=True, kw_only=True)
class NoiseLine(Line):
    """One measurement of the noise scale in one geometry, by one estimate."""

    kind = "noise"
    geometry: str
    estimate: str
    noise: float  # of one sequence's gradient, in the geometry's unit
    signal: float  # same unit
    noise_scale: float | None  # their quotient, sequences; None where there is no signal
    noise_ema: float  # smoothed, as the next
    signal_ema: float
    noise_scale_ema: float | None  # the smoothed ones' quotient, sequences
    num_samples: int  # micro-batches over all ranks
    seconds: float  # extra wall time of the measurement
    more: dict[str, Any] = field(default_factory=dict)  # further fields, written after these

    def as_record(self) -> dict[str, Any]:
        """The object that is written."""
        record = super().as_record()
        more = record.pop("more")
        return record | more


@dataclass(frozen=True, kw_only=True)
class BatchSizeLine(Line):
    """A decision of the batch-size policy; `step` is the first of the new size."""

    kind = "batch_size"
    previous: int  # sequences; written as "from"
    new: int  # sequences; written as "to"
    # Sequences before rounding; None where the ranks alone made another size necessary.
    target: float | None
    lr_multiplier: float  # on the scheduled learning rate from here on

    def as_record(self) -> dict[str, Any]:
        """The object that is written."""
        names = {"previous": "from", "new": "to"}
        return {names.get(name, name): value for name, value in super().as_record().items()}


@dataclass(frozen=True, kw_only=True)
class ShadowLine(BatchSizeLine):
    """What a policy that is not followed would have decided."""

    kind = "shadow"
    policy: str
