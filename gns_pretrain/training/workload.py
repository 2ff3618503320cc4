"""What a run trains on, as far as loop, step, checks and header ask for it: one interface.

Two classes of `gns_pretrain.workloads` have it: language and images. Nothing else here knows which
of them a run has.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.roles import Labels
from gns_pretrain.model.settings import ModelSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.unit import Unit

# Arguments of the model, which returns the mean loss over them ([], float32, nats): inputs and
# targets, each [micro_batch_size, ...] on the device.
MicroBatch: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float  # the validation loss, nats
    more: Mapping[str, float] = field(default_factory=dict)  # further fields of the record's line


class Size(NamedTuple):
    """What the memory of a run depends on, in numbers and bytes."""

    parameters: int
    matrices: int  # of the parameters, those in the blocks' matrices
    micro_batch: int  # bytes of a rank's, at least, when a backward pass begins
    grams: int  # bytes of the Gram matrices of all blocks' matrices
    sample: str  # what the size of a sample comes from, for errors: data.sequence_length=2048


class Description(NamedTuple):
    """A run's plan, for its header."""

    model: str
    data: str
    batch: str  # the first one
    notes: list[str]


class Workload(ABC):
    """Model, batches, loss and evaluation of a run, made from its settings.

    Making one opens the data and raises an InputError for what is wrong with it. `begin` comes
    before batches and evaluation.

    Attributes:
        unit: in what budget and axes count.
        budget: of the unit; the run ends with the first whole step that reaches it.
        evaluate_every: of the unit, between two evaluations.
        measure_every: samples between two measurements; None: noise_scale.every_steps says it.
        fingerprint: of the data, whatever its folder is called.
        model: its settings, with what the data decides filled in.
        parameter_kinds: labels of parameters for the noise scale by kind; None: their roles.
        trains_on: text or images, for errors.
        refused: settings of other workloads, by dotted names, which it does not read.
    """

    unit: Unit
    budget: int
    evaluate_every: int
    measure_every: int | None = None
    fingerprint: str
    model: ModelSettings
    parameter_kinds: Labels | None = None
    trains_on: ClassVar[str]
    refused: ClassVar[tuple[str, ...]] = ()

    def refuse_settings_of_others(self, config: Any) -> None:
        """Raise InputError for a setting that only another workload reads.

        Args:
            config: the run's; a setting at its default was not given.
        """
        for name in self.refused:
            *sections, last = name.split(".")
            holder = reduce(getattr, sections, config)
            (known,) = (each for each in fields(holder) if each.name == last)
            default = None if known.default == "???" else known.default
            if (value := getattr(holder, last)) != default:
                shown = "null" if default is None else default
                raise InputError(
                    f"{name}={value} is not read by a run on {self.trains_on}; use {name}={shown}"
                )

    def check(self) -> None:
        """Check settings against the data; InputError at the first rule that is broken."""
        return

    @abstractmethod
    def size(self) -> Size:
        """What the memory depends on."""

    @abstractmethod
    def describe(self, device: str) -> Description:
        """For the header of a run on `cpu` or `cuda`."""

    @abstractmethod
    def build_model(self, world: World) -> nn.Module:
        """The model with its first weights, compiled where asked, and parallelized."""

    def peak_speed(self, world: World) -> float | None:
        """Of the unit, a second, at the peak FLOP/s of all GPUs; None where that is not known."""
        return None

    @abstractmethod
    def begin(self, world: World) -> None:
        """Read what evaluation needs, and get ready to read batches, as a rank of `world`."""

    @abstractmethod
    def micro_batches(
        self, cursor: int, *, batch_size: int, micro_batch_size: int
    ) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step; micro-batch j goes to rank j % num_ranks.

        Args:
            cursor: samples consumed before this step, over all ranks.
            batch_size: samples of the step over all ranks, a multiple of micro_batch_size.
        """

    @abstractmethod
    def used_up(self, cursor: int) -> list[str]:
        """Name the data of which every sample was consumed before cursor: it repeats."""

    @abstractmethod
    def evaluate(self, model: nn.Module, *, chunk: int, world: World) -> Evaluation:
        """Evaluate on the validation split, alike on every layout, `chunk` samples at once."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading ahead; the object cannot be used afterwards."""

    @property
    def tokens_per_parameter(self) -> float:
        """Of the budget; InputError where it is no budget of tokens."""
        raise InputError(
            "optimizer.weight_decay_timescale=auto is a law in tokens, and this run is on "
            f"{self.trains_on}; give a number"
        )

    @property
    def total_samples(self) -> int:
        """Samples that reach the budget."""
        return -(-self.budget // self.unit.per_sample)

    def steps_at(self, batch_size: int) -> int:
        """Steps that the budget takes at a constant batch."""
        return -(-self.total_samples // batch_size)
