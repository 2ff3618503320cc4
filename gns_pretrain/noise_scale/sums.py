"""What the samples of a step leave behind on one rank, and what it says of each weight.

Legend: R samples; W weights; every rank holds its own rows of a weight, and the whole of the
matrices that it owns. All fields are sums or means over samples, so leaving samples out again is a
subtraction, which the jackknife uses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gns_pretrain.geometry.square_root import smaller_side_gram
from gns_pretrain.noise_scale.geometries import (
    coordinate_variance,
    euclidean_cross_totals,
    euclidean_signal_total,
    half_means,
    manhattan_cross_total,
    manhattan_noise_total,
    manhattan_signal_total,
    nuclear_cross_totals,
    nuclear_totals,
)

# What adds up over weights and ranks; a column each of the one table that is all-reduced.
COLUMNS = (
    "sample_squares",  # sum over samples of ||g^j||_2^2
    "mean_squares",  # ||g||_2^2
    "sigma",  # sum_i sigma_i
    "mean_abs",  # ||g||_1
    "cross_product",  # <g_A, g_B>
    "cross_first",  # ||g_A||_2^2
    "cross_second",  # ||g_B||_2^2
    "manhattan_cross",  # s of the sign
    "trace_root",  # tr C^(1/2)
    "nuclear_norm",  # ||G||_S1
    "nuclear_cross",  # s of the matrix sign
    "fallbacks",  # square roots that took the exact route after all; a chunk's, on its first weight
)
COLUMN = {name: index for index, name in enumerate(COLUMNS)}

# Of Grams whose roots are taken together, 64 MiB in float64. Eight such tensors live at a time in
# the exact mode and 26 in the iterative one, beside the owned Grams and however many those are.
CHUNK_ENTRIES = 2**23


@dataclass(frozen=True)
class SampleSums:
    """One rank's part of R samples.

    Args:
        num_even: samples over all ranks with an even index.
        num_odd: those with an odd one.
        square_norms: [W], float64; ||g^j||_2^2 summed over this rank's own samples.
        means: this rank's rows of the mean gradient of each weight, flat; empty on a rank whose
            rows another rank holds too and speaks for.
        squares: the same rows of sum_j (g^j)^2, perhaps with padding behind; empty if not needed.
        signed: the same rows of sum_j (+-1) g^j; empty if not needed.
        grams: sum_j of the smaller side's Gram, float64, of each owned matrix by weight.
        matrices: the mean gradient of each owned matrix, whole.
        signed_matrices: sum_j (+-1) G^j of each owned matrix; empty if not needed.
    """

    num_even: int
    num_odd: int
    square_norms: Tensor
    means: list[Tensor]
    squares: list[Tensor]
    signed: list[Tensor]
    grams: dict[int, Tensor]
    matrices: dict[int, Tensor]
    signed_matrices: dict[int, Tensor]

    @property
    def num_samples(self) -> int:
        """R."""
        return self.num_even + self.num_odd

    def without(self, part: "SampleSums") -> "SampleSums":
        """The same without some of the samples, as they would have been summed by themselves.

        Where they were a whole half, nothing cross-fitted is left.
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
        )

    def copied(self) -> "SampleSums":
        """The same with means of its own: they are the gradients themselves, which will change."""
        return replace(
            self,
            means=[mean.clone() for mean in self.means],
            matrices={i: matrix.clone() for i, matrix in self.matrices.items()},
        )


def totals_of(sums: SampleSums, *, batch_size: int, square_root: str) -> Tensor:
    """One rank's part of the table of totals, [W, columns] in float64; it adds up over ranks.

    Args:
        sums: of this rank.
        batch_size: B, sequences of all the samples.
        square_root: mode of `trace_square_root`.
    """
    width = len(sums.square_norms)
    totals = sums.square_norms.new_zeros(width, len(COLUMNS))
    totals[:, COLUMN["sample_squares"]] = sums.square_norms
    for index in range(len(sums.means)):
        add_rows(totals[index], sums, index, batch_size)
    if sums.matrices:
        add_matrices(totals, sums, batch_size, square_root)
    return totals


def add_rows(totals: Tensor, sums: SampleSums, index: int, batch_size: int) -> None:
    """What adds up over coordinates, of one weight."""
    mean, samples = sums.means[index], sums.num_samples
    totals[COLUMN["mean_squares"]] = euclidean_signal_total(mean)
    if sums.squares:
        mean_square = sums.squares[index][: mean.numel()] / samples
        variance = coordinate_variance(
            mean_square, mean, batch_size=batch_size, num_samples=samples
        )
        totals[COLUMN["sigma"]] = manhattan_noise_total(variance)
        totals[COLUMN["mean_abs"]] = manhattan_signal_total(mean)
    if sums.signed:
        signed = sums.signed[index][: mean.numel()]
        first, second = half_means(
            mean * samples, signed, num_even=sums.num_even, num_odd=sums.num_odd
        )
        start = COLUMN["cross_product"]
        totals[start : start + 3] = euclidean_cross_totals(first, second)
        totals[COLUMN["manhattan_cross"]] = manhattan_cross_total(first, second)


def add_matrices(totals: Tensor, sums: SampleSums, batch_size: int, square_root: str) -> None:
    """What needs whole matrices, of those that this rank owns."""
    samples = sums.num_samples
    for members in chunks_of_one_size(sums.grams):
        nuclear = nuclear_totals(
            torch.stack([sums.grams[i] for i in members]) / samples,
            torch.stack([smaller_side_gram(sums.matrices[i].double()) for i in members]),
            batch_size=batch_size,
            num_samples=samples,
            mode=square_root,
        )
        totals[members, COLUMN["trace_root"]] = nuclear.noise
        totals[members, COLUMN["nuclear_norm"]] = nuclear.signal
        totals[members[0], COLUMN["fallbacks"]] = nuclear.num_fallbacks
    for index, signed in sums.signed_matrices.items():
        first, second = half_means(
            sums.matrices[index] * samples, signed, num_even=sums.num_even, num_odd=sums.num_odd
        )
        gain = nuclear_cross_totals(first[None], second[None])[0]
        totals[index, COLUMN["nuclear_cross"]] = gain


def chunks_of_one_size(grams: dict[int, Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one size, as many as `CHUNK_ENTRIES` holds and at least one."""
    sizes: dict[int, list[int]] = {}
    for index, gram in grams.items():
        sizes.setdefault(len(gram), []).append(index)
    for size, members in sizes.items():
        count = max(1, CHUNK_ENTRIES // size**2)
        for start in range(0, len(members), count):
            yield members[start : start + count]
