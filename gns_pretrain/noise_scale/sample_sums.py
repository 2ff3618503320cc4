"""What the samples of a step leave behind: gathered by the tap, read by the geometries.

Legend as in `equations.py`; W weights. No process groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.model.roles import Role
from gns_pretrain.noise_scale.equations import (
    absolute_sums,
    coordinate_variance,
    half_means,
    part_means,
)

# Of rows that are read together, 64 MiB in float32: few kernels, whose results are as small.
ROW_ENTRIES = 2**24

# Parts of a step that `nested` compares beside its halves: every so-manieth sample, smallest first.
NESTED_STRIDES = (8, 4)


@dataclass(frozen=True)
class Needs:
    """What the gradient tap gathers beside the samples' norms and the mean gradient."""

    squares: bool = False  # sum_j (g^j)^2 of every coordinate
    signed_sums: bool = False  # sum_j (+-1) g^j, with +1 for even and -1 for odd sample indices
    nested_sums: bool = False  # sum_j g^j of every 8th and of every 4th sample
    matrices: frozenset[Role] = frozenset()  # whole, and their Grams' sum, on one owner each
    # Of the optimizer, which the meter is then given:
    second_moments: bool = False  # what Adam divides each coordinate by
    lengths: bool = False  # of each weight's step

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.squares or other.squares,
            self.signed_sums or other.signed_sums,
            self.nested_sums or other.nested_sums,
            self.matrices | other.matrices,
            self.second_moments or other.second_moments,
            self.lengths or other.lengths,
        )


@dataclass(frozen=True)
class SampleSums:
    """What R samples leave on one rank: its rows of every weight, and the matrices that it owns.

    All fields are sums or means over samples, so leaving samples out is a subtraction. What is not
    needed is empty, and so are the rows of a rank whose rows another replica contributes.
    """

    num_even: int  # samples over all ranks with an even index
    num_odd: int
    square_norms: Tensor  # [W], float64; ||g^j||_2^2 summed over this rank's own samples
    means: list[Tensor]  # this rank's rows of each weight's mean gradient
    squares: list[Tensor]  # likewise of sum_j (g^j)^2
    signed: list[Tensor]  # likewise of sum_j (+-1) g^j
    grams: dict[int, Tensor]  # by owned weight: sum_j of the smaller side's Gram, float64
    matrices: dict[int, Tensor]  # its mean gradient, whole
    signed_matrices: dict[int, Tensor]  # its sum_j (+-1) G^j
    # By NESTED_STRIDES: sums over every so-manieth sample, of rows and of matrices.
    nested: list[list[Tensor]] = field(default_factory=list)
    nested_matrices: list[dict[int, Tensor]] = field(default_factory=list)
    is_matrix: list[bool] = field(default_factory=list)  # by weight, whether its role is MATRIX
    # Of the optimizer: this rank's rows of v^(1/2) + epsilon, by weight that Adam trains, and each
    # weight's step along a direction of unit norm.
    scales: dict[int, Tensor] = field(default_factory=dict)
    lengths: list[float] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """R."""
        return self.num_even + self.num_odd

    def row_groups(self) -> Iterator[slice]:
        """Neighbouring weights that `ROW_ENTRIES` hold the rows of, at least one at a time."""
        start = entries = 0
        for stop, mean in enumerate(self.means):
            if start < stop and entries + mean.numel() > ROW_ENTRIES:
                yield slice(start, stop)
                start, entries = stop, 0
            entries += mean.numel()
        if self.means:
            yield slice(start, len(self.means))

    def variance(self, index: int, *, batch_size: int) -> Tensor:
        """Per-sequence variance of each coordinate of this rank's rows of a weight (Eq. 20)."""
        return self.variance_of(self.squares[index], self.means[index], batch_size=batch_size)

    def variance_of(self, squares: Tensor, mean: Tensor, *, batch_size: int) -> Tensor:
        """The same of sum_j (g^j)^2 and g of any coordinates."""
        samples = self.num_samples
        return coordinate_variance(
            squares / samples, mean, batch_size=batch_size, num_samples=samples
        )

    def only(self, weights: Sequence[int]) -> "SampleSums":
        """Return the rows of some weights, as if there were no others, and no matrices."""

        def chosen(of_weights: list[Any]) -> list[Any]:
            return [of_weights[i] for i in weights] if of_weights else []

        return replace(
            self,
            square_norms=torch.stack([self.square_norms[i] for i in weights]),
            means=chosen(self.means),
            squares=chosen(self.squares),
            signed=chosen(self.signed),
            nested=[chosen(rows) for rows in self.nested],
            grams={},
            matrices={},
            signed_matrices={},
            nested_matrices=[],
            is_matrix=chosen(self.is_matrix),
            scales={place: self.scales[i] for place, i in enumerate(weights) if i in self.scales},
            lengths=chosen(self.lengths),
        )

    def over_scales(self, power: float = 1.0) -> Iterator[tuple[list[int], "SampleSums"]]:
        """Yield the weights that have scales, as many at a time as `row_groups` takes together.

        Every coordinate is divided by its scale to a power, as if each sample had come so. The sums
        of squares make the samples' norms, so that those add up over ranks as rows do.
        """
        weights = list(self.scales)
        for rows in self.only(weights).row_groups() if weights else ():
            few = self.only(weights[rows])
            inverse = [scale.pow(-power) for scale in few.scales.values()]
            squares = list(torch._foreach_mul(few.squares, torch._foreach_mul(inverse, inverse)))
            yield (
                weights[rows],
                replace(
                    few,
                    square_norms=absolute_sums(*joined(squares)),
                    means=list(torch._foreach_mul(few.means, inverse)),
                    squares=squares,
                    signed=list(torch._foreach_mul(few.signed, inverse)) if few.signed else [],
                    nested=[list(torch._foreach_mul(sums, inverse)) for sums in few.nested],
                ),
            )

    def halves(self, mean: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
        """g_A and g_B of a weight's rows or of a whole matrix."""
        total = mean * self.num_samples
        return half_means(total, signed, num_even=self.num_even, num_odd=self.num_odd)

    def nested_rows(self, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """Each stride with the sums over its part of neighbouring weights' rows, flat."""
        for stride, nested in zip(NESTED_STRIDES, self.nested, strict=False):
            yield stride, joined(nested[rows])[0]

    def part(self, stride: int, mean: Tensor, nested: Tensor) -> tuple[Tensor, Tensor]:
        """g_A and g_rest of a weight's rows or of a whole matrix, A every stride-th sample."""
        samples, num_part = self.num_samples, -(-self.num_samples // stride)
        return part_means(mean * samples, nested, num_part=num_part, num_samples=samples)

    def without(self, part: "SampleSums") -> "SampleSums":
        """Leave some of the samples out, as if the others had been summed by themselves.

        Where they were a whole half, nothing cross-fitted is left, and nothing nested ever.
        """
        left = self.num_samples - part.num_samples
        halves = self.num_even > part.num_even and self.num_odd > part.num_odd

        def mean(whole: Tensor, removed: Tensor) -> Tensor:
            return (whole * self.num_samples - removed * part.num_samples) / left

        return SampleSums(
            num_even=self.num_even - part.num_even,
            num_odd=self.num_odd - part.num_odd,
            square_norms=self.square_norms - part.square_norms,
            means=[mean(*pair) for pair in zip(self.means, part.means, strict=True)],
            squares=[a - b for a, b in zip(self.squares, part.squares, strict=True)],
            signed=[a - b for a, b in zip(self.signed, part.signed, strict=True)] if halves else [],
            grams={i: gram - part.grams[i] for i, gram in self.grams.items()},
            matrices={i: mean(m, part.matrices[i]) for i, m in self.matrices.items()},
            signed_matrices={
                i: m - part.signed_matrices[i] for i, m in self.signed_matrices.items() if halves
            },
            is_matrix=self.is_matrix,
            scales=self.scales,
            lengths=self.lengths,
        )

    def copied(self) -> "SampleSums":
        """Clone the means: they are the gradients themselves, which will change."""
        return replace(
            self,
            means=[mean.clone() for mean in self.means],
            matrices={i: matrix.clone() for i, matrix in self.matrices.items()},
        )


def joined(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Rows of several weights, flat and one after the other, and how many entries each has."""
    flat = [part.reshape(-1) for part in rows]
    return flat[0] if len(flat) == 1 else torch.cat(flat), [len(part) for part in flat]
