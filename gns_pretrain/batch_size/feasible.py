"""Batch sizes that ranks can really take: ranks x micro-batch x accumulation.

Growing, the micro-batch comes first, in set steps up to its maximum, then the accumulation:

    8 ranks, micro-batch 8 growing by 4 to 16:  64, 96, 128, then 256, 384, 512, ...

which are the sizes of the published signSGD runs (arXiv:2602.03001, Figure 3). A step never has
fewer than `min_samples` micro-batches over all ranks, the samples that the noise scale compares:
few ranks therefore accumulate from the start. Sizes count what a micro-batch counts: sequences,
images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gns_pretrain.errors import InputError, counted

LARGEST_HINTED = 10_000  # micro-batch; a larger one is nobody's choice


@dataclass(frozen=True)
class Split:
    """One optimizer step over ranks."""

    num_ranks: int  # data-parallel ones
    micro_batch_size: int  # of one rank
    accumulation: int  # micro-batches of each rank

    @property
    def batch_size(self) -> int:
        """Of the step, over all ranks."""
        return self.num_ranks * self.micro_batch_size * self.accumulation

    def __str__(self) -> str:
        of_rank = f"{self.micro_batch_size}"
        if self.accumulation > 1:
            of_rank = f"{self.accumulation} micro-batches of {self.micro_batch_size}"
        return f"{self.batch_size:,} = {counted(self.num_ranks, 'rank')} x {of_rank}"


@dataclass(frozen=True)
class FeasibleSizes:
    """Every size that may be taken, each with its one split."""

    num_ranks: int  # data-parallel ones
    micro_batch_size: int  # the smallest micro-batch
    micro_batch_max: int  # the largest; equal to the smallest, the micro-batch keeps its shape
    micro_batch_step: int = 1  # by which it grows; the last step may be shorter
    min_samples: int = 1  # micro-batches over all ranks that a step has at least
    # What the user calls these fields, for errors; where nothing stands, as they are called here.
    names: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check that the micro-batch can grow; InputError."""
        if self.micro_batch_max < self.micro_batch_size:
            raise InputError(
                f"{self._name_of('micro_batch_max')}={self.micro_batch_max} is below "
                f"micro_batch_size={self.micro_batch_size}, from which it grows; raise it, or "
                "leave it out to hold the shape"
            )

    def at_most(self, size: float) -> Split | None:
        """The largest feasible size that is not above `size`; None below the smallest one."""
        whole = math.floor(size)
        micro_batch = whole // self._first_unit
        if micro_batch >= self.micro_batch_max:
            return self._accumulated(whole // self._unit)
        if micro_batch < self.micro_batch_size:
            return None
        steps = (micro_batch - self.micro_batch_size) // self.micro_batch_step
        return self._growing(steps)

    def at_least(self, size: float) -> Split:
        """The smallest feasible size that is not below `size`."""
        whole = math.ceil(size)
        micro_batch = -(-whole // self._first_unit)
        if micro_batch > self.micro_batch_max:
            return self._accumulated(-(-whole // self._unit))
        missing = max(micro_batch - self.micro_batch_size, 0)
        return self._growing(-(-missing // self.micro_batch_step))

    def require(self, size: int, name: str) -> Split:
        """Return the split of a size that the user named in a setting.

        Raises:
            InputError: it is not feasible; with the nearest sizes that are.
        """
        below = self.at_most(size)
        if below is not None and below.batch_size == size:
            return below
        if self.min_samples <= self.num_ranks and self.micro_batch_max == self.micro_batch_size:
            raise InputError(
                f"{name}={size} cannot be split over {counted(self.num_ranks, 'rank')} in "
                f"micro-batches of micro_batch_size={self.micro_batch_size}; "
                f"use a multiple of {self._unit} "
                f"(nearest: {max(1, round(size / self._unit)) * self._unit}) or "
                "another micro_batch_size"
            )
        nearest = [below] if below else []
        texts = [f"{name}={split.batch_size}" for split in [*nearest, self.at_least(size)]]
        raise InputError(
            f"{name}={size} is not feasible on {self}; use {' or '.join(texts)}"
            f"{self._other_micro_batch(size)}"
        )

    def __str__(self) -> str:
        text = f"{counted(self.num_ranks, 'rank')} in micro-batches of {self.micro_batch_size}"
        if self.micro_batch_max > self.micro_batch_size:
            text += f" to {self.micro_batch_max} in steps of {self.micro_batch_step}"
        if self.min_samples > 1:
            minimum = f"{self._name_of('min_samples')}={self.min_samples}"
            text += f", at least {minimum} of them a step"
        return text

    @property
    def _unit(self) -> int:
        """What one more micro-batch on every rank adds, at the largest micro-batch."""
        return self.num_ranks * self.micro_batch_max

    def _name_of(self, field: str) -> str:
        return self.names.get(field, field)

    def _accumulated(self, accumulation: int) -> Split:
        return Split(self.num_ranks, self.micro_batch_max, accumulation)

    @property
    def _first_accumulation(self) -> int:
        """Micro-batches of each rank while the micro-batch grows."""
        return math.ceil(self.min_samples / self.num_ranks)

    @property
    def _first_unit(self) -> int:
        """What one more sequence in each micro-batch adds while the micro-batch grows."""
        return self.num_ranks * self._first_accumulation

    def _growing(self, steps: int) -> Split:
        """The size that so many steps of the micro-batch give."""
        grown = self.micro_batch_size + steps * self.micro_batch_step
        micro_batch = min(grown, self.micro_batch_max)
        return Split(self.num_ranks, micro_batch, self._first_accumulation)

    def _other_micro_batch(self, size: int) -> str:
        """Hint at the largest smaller micro-batch with which `size` would be feasible."""
        largest = min(self.micro_batch_size - 1, LARGEST_HINTED)
        for smaller in range(largest, 0, -1):
            accumulation, rest = divmod(size, self.num_ranks * smaller)
            if rest == 0 and accumulation * self.num_ranks >= self.min_samples:
                return f", or micro_batch_size={smaller}"
        return ""
