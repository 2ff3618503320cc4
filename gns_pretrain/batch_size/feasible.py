"""Batch sizes that ranks can really take: ranks x micro-batch x accumulation.

Growing, the micro-batch comes first, in set steps up to its maximum, then the accumulation:

    8 ranks, micro-batch 8 growing by 4 to 16:  64, 96, 128, then 256, 384, 512, ...

which are the sizes of the published signSGD runs (arXiv:2602.03001, Figure 3). A step never has
fewer than `min_samples` micro-batches over all ranks, the samples that the noise scale compares:
few ranks therefore accumulate from the start. Sizes are in sequences.
"""

import math
from dataclasses import dataclass

from gns_pretrain.errors import InputError


@dataclass(frozen=True)
class Split:
    """One optimizer step over ranks.

    Args:
        num_ranks: data-parallel ranks.
        micro_batch_size: sequences per micro-batch and rank.
        accumulation: micro-batches of each rank.
    """

    num_ranks: int
    micro_batch_size: int
    accumulation: int

    @property
    def batch_size(self) -> int:
        """Sequences of the step over all ranks."""
        return self.num_ranks * self.micro_batch_size * self.accumulation

    def __str__(self) -> str:
        parts = [ranks_text(self.num_ranks), f"{self.micro_batch_size} sequences"]
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} micro-batches")
        return f"{self.batch_size:,} = " + " x ".join(parts)


@dataclass(frozen=True)
class FeasibleSizes:
    """Every size that may be taken, each with its one split.

    Args:
        num_ranks: data-parallel ranks.
        micro_batch_size: the smallest micro-batch.
        micro_batch_max: the largest; equal to the smallest, the micro-batch keeps its shape.
        micro_batch_step: sequences by which it grows; the last step may be shorter.
        min_samples: micro-batches over all ranks that a step has at least.
    """

    num_ranks: int
    micro_batch_size: int
    micro_batch_max: int
    micro_batch_step: int = 1
    min_samples: int = 1

    def at_most(self, size: float) -> Split | None:
        """The largest feasible size that is not above `size`; None below the smallest one."""
        growing = self._while_micro_batch_grows()
        if size >= growing[-1].batch_size:
            return self._accumulated(math.floor(size / self._unit))
        return max(
            (split for split in growing if split.batch_size <= size),
            key=lambda split: split.batch_size,
            default=None,
        )

    def at_least(self, size: float) -> Split:
        """The smallest feasible size that is not below `size`."""
        for split in self._while_micro_batch_grows():
            if split.batch_size >= size:
                return split
        return self._accumulated(math.ceil(size / self._unit))

    def require(self, size: int, name: str) -> Split:
        """The split of a size that somebody asked for.

        Args:
            size: sequences.
            name: the setting it comes from.

        Raises:
            InputError: it is not feasible; names the nearest sizes that are.
        """
        below = self.at_most(size)
        if below is not None and below.batch_size == size:
            return below
        if self.min_samples <= self.num_ranks and self.micro_batch_max == self.micro_batch_size:
            accumulation_steps(
                size, num_ranks=self.num_ranks, micro_batch_size=self.micro_batch_size, name=name
            )
        nearest = [below] if below else []
        texts = [f"{name}={split.batch_size}" for split in [*nearest, self.at_least(size)]]
        raise InputError(
            f"{name}={size} is not feasible on {self}; use {' or '.join(texts)}"
            f"{self._other_micro_batch(size)}"
        )

    def __str__(self) -> str:
        sequences = f"{self.micro_batch_size} sequences"
        if self.micro_batch_max > self.micro_batch_size:
            sequences = (
                f"{self.micro_batch_size} to {self.micro_batch_max} sequences "
                f"in steps of {self.micro_batch_step}"
            )
        text = f"{ranks_text(self.num_ranks)} in micro-batches of {sequences}"
        if self.min_samples > 1:
            text += f", at least noise_scale.min_samples={self.min_samples} of them a step"
        return text

    @property
    def _unit(self) -> int:
        """Sequences that one more micro-batch on every rank adds, once it is at its maximum."""
        return self.num_ranks * self.micro_batch_max

    def _accumulated(self, accumulation: int) -> Split:
        return Split(self.num_ranks, self.micro_batch_max, accumulation)

    def _while_micro_batch_grows(self) -> list[Split]:
        """The smallest sizes, ascending, up to the first one with the largest micro-batch."""
        accumulation = math.ceil(self.min_samples / self.num_ranks)
        sizes = range(self.micro_batch_size, self.micro_batch_max, self.micro_batch_step)
        return [
            Split(self.num_ranks, size, accumulation) for size in [*sizes, self.micro_batch_max]
        ]

    def _other_micro_batch(self, size: int) -> str:
        """The largest smaller micro-batch with which `size` would be feasible, as a way out."""
        for smaller in range(self.micro_batch_size - 1, 0, -1):
            accumulation, rest = divmod(size, self.num_ranks * smaller)
            if rest == 0 and accumulation * self.num_ranks >= self.min_samples:
                return f", or micro_batch_size={smaller}"
        return ""


def accumulation_steps(
    batch_size: int, *, num_ranks: int, micro_batch_size: int, name: str = "batch_size.initial"
) -> int:
    """Micro-batches that each rank takes in one optimizer step.

    Args:
        batch_size: sequences per step over all ranks.
        num_ranks: data-parallel ranks.
        micro_batch_size: sequences per micro-batch and rank.
        name: the setting that the batch size comes from.

    Raises:
        InputError: the batch is not a whole number of micro-batches on every rank.
    """
    unit = num_ranks * micro_batch_size
    if batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise InputError(
            f"{name}={batch_size} cannot be split over {ranks_text(num_ranks)} "
            f"in micro-batches of micro_batch_size={micro_batch_size} sequences; "
            f"use a multiple of {unit} (nearest: {nearest}) or another micro_batch_size"
        )
    return batch_size // unit


def ranks_text(num_ranks: int) -> str:
    """1 rank, 2 ranks."""
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
