"""Batch sizes that ranks can really take: ranks x micro-batch x accumulation.

Growing, the micro-batch comes first, in set steps up to its maximum, then the accumulation:

    8 ranks, micro-batch 8 growing by 4 to 16:  64, 96, 128, then 256, 384, 512, ...

which are the sizes of the published signSGD runs (arXiv:2602.03001, Figure 3). A step never has
fewer than `min_samples` micro-batches over all ranks, the samples that the noise scale compares:
few ranks therefore accumulate from the start. Sizes are in sequences.
"""

import math
from dataclasses import dataclass

from gns_pretrain.errors import InputError, counted


@dataclass(frozen=True)
class Split:
    """One optimizer step over ranks."""

    num_ranks: int  # data-parallel ones
    micro_batch_size: int  # sequences per micro-batch and rank
    accumulation: int  # micro-batches of each rank

    @property
    def batch_size(self) -> int:
        """Sequences of the step over all ranks."""
        return self.num_ranks * self.micro_batch_size * self.accumulation

    def __str__(self) -> str:
        parts = [counted(self.num_ranks, "rank"), counted(self.micro_batch_size, "sequence")]
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} micro-batches")
        return f"{self.batch_size:,} = " + " x ".join(parts)


@dataclass(frozen=True)
class FeasibleSizes:
    """Every size that may be taken, each with its one split."""

    num_ranks: int  # data-parallel ones
    micro_batch_size: int  # the smallest micro-batch
    micro_batch_max: int  # the largest; equal to the smallest, the micro-batch keeps its shape
    micro_batch_step: int = 1  # sequences by which it grows; the last step may be shorter
    min_samples: int = 1  # micro-batches over all ranks that a step has at least

    def at_most(self, size: float) -> Split | None:
        """The largest feasible size that is not above `size`; None below the smallest one."""
        growing = self._while_micro_batch_grows()
        if size >= growing[-1].batch_size:
            return self._accumulated(math.floor(size / self._unit))
        below = [split for split in growing if split.batch_size <= size]
        return below[-1] if below else None

    def at_least(self, size: float) -> Split:
        """The smallest feasible size that is not below `size`."""
        for split in self._while_micro_batch_grows():
            if split.batch_size >= size:
                return split
        return self._accumulated(math.ceil(size / self._unit))

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
                f"micro-batches of micro_batch_size={counted(self.micro_batch_size, 'sequence')}; "
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
        sequences = counted(self.micro_batch_size, "sequence")
        if self.micro_batch_max > self.micro_batch_size:
            sequences = (
                f"{self.micro_batch_size} to {self.micro_batch_max} sequences "
                f"in steps of {self.micro_batch_step}"
            )
        text = f"{counted(self.num_ranks, 'rank')} in micro-batches of {sequences}"
        if self.min_samples > 1:
            text += f", at least noise_scale.min_samples={self.min_samples} of them a step"
        return text

    @property
    def _unit(self) -> int:
        """Sequences that one more micro-batch on every rank adds, at the largest micro-batch."""
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
        """Hint at the largest smaller micro-batch with which `size` would be feasible."""
        for smaller in range(self.micro_batch_size - 1, 0, -1):
            accumulation, rest = divmod(size, self.num_ranks * smaller)
            if rest == 0 and accumulation * self.num_ranks >= self.min_samples:
                return f", or micro_batch_size={smaller}"
        return ""
