"""Cross-fitted signals by hand, and what they need where a half has few tokens."""

import statistics

import pytest
import torch
from torch import Tensor

from gns_pretrain.geometry.directions import matrix_sign
from gns_pretrain.noise_scale.equations import (
    cross_grams,
    euclidean_cross_signal,
    euclidean_cross_totals,
    half_means,
    manhattan_cross_total,
    nuclear_cross_total,
)


@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_halves_are_the_means_of_even_and_odd_samples(num_samples: int) -> None:
    samples = torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(0)).double()
    signed = samples[0::2].sum(0) - samples[1::2].sum(0)
    first, second = half_means(
        samples.sum(0), signed, num_even=(num_samples + 1) // 2, num_odd=num_samples // 2
    )
    torch.testing.assert_close(first, samples[0::2].mean(0))
    torch.testing.assert_close(second, samples[1::2].mean(0))


def test_rounding_of_the_other_half_is_no_gradient() -> None:
    # Half A alone has the first coordinate, B the last; S and D of them differ by two roundings.
    half_a, half_b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -2.0, 5.0])
    total = (half_a + half_b) * (1 + 2.4e-7)
    first, second = half_means(total, half_a - half_b, num_even=1, num_odd=1)
    assert (first[2], second[0]) == (0.0, 0.0)
    # <a, sign b> = -4 and <b, sign a> = -2; the roundings' signs would have added 3 + 5.
    assert manhattan_cross_total(first, second).item() == pytest.approx(-3.0, rel=1e-6)


def test_half_that_is_not_finite_stays_so() -> None:
    total = torch.tensor([torch.nan, torch.inf])
    for half in half_means(total, torch.zeros(2), num_even=1, num_odd=1):
        assert not half.isfinite().any()


def test_euclidean_cross_signal_by_hand() -> None:
    # <a, b> = 24, norms 5 and 8: (24 / 8 + 24 / 5) / 2 = 3.9.
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([8.0, 0.0])
    totals = euclidean_cross_totals(first, second)
    assert totals.tolist() == [24.0, 25.0, 64.0]
    assert euclidean_cross_signal(totals).item() == pytest.approx(3.9)


def test_euclidean_direction_is_that_of_all_shards_together() -> None:
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([8.0, 0.0])
    shards = [euclidean_cross_totals(first[index], second[index]) for index in range(2)]
    totals = torch.stack(shards).sum(0)
    assert euclidean_cross_signal(totals).item() == pytest.approx(3.9)


def test_a_half_without_gradient_has_no_direction() -> None:
    totals = euclidean_cross_totals(torch.zeros(2), torch.ones(2))
    assert euclidean_cross_signal(totals) == 0.0


def test_manhattan_cross_total_by_hand() -> None:
    # <a, sign b> = 3 - 4 = -1 and <b, sign a> = 1 - 2 = -1.
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -2.0])
    assert manhattan_cross_total(first, second) == -1.0


def nuclear_cross(first: Tensor, second: Tensor, **options: float) -> Tensor:
    return nuclear_cross_total(*cross_grams(first, second), **options)


def test_nuclear_cross_total_by_hand() -> None:
    # Diagonal halves: the matrix sign is the sign of the diagonal, as above.
    first, second = torch.diag(torch.tensor([3.0, 4.0])), torch.diag(torch.tensor([1.0, -2.0]))
    stack = torch.stack([first, 10.0 * first]), torch.stack([second, second])
    # Scaled by 10: <10 a, sign b> = -10 and <b, sign a> = -1.
    assert nuclear_cross(*stack).tolist() == pytest.approx([-1.0, -5.5])


def test_a_rank_deficient_half_needs_the_rank_cut() -> None:
    # Halves of 6 tokens, 24 wide, around a common mean: float32 rounding fills 18 directions, by
    # how much depends on the machine's SVD and on the draw. Hence many draws, and their median.
    off_uncut = []
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(6, 36, generator=generator, dtype=torch.float64)
        halves = [
            torch.randn(24, 6, generator=generator, dtype=torch.float64)
            @ (shared + torch.randn(6, 36, generator=generator, dtype=torch.float64))
            for _ in range(2)
        ]
        truth = cross_of(halves, [sign_of_rank(half, 6) for half in halves])
        rounded = [half.float() for half in halves]
        cut = nuclear_cross(*rounded).item()
        # 1e-7 of the gradients' Frobenius norms, 24 * 36 * 6 coordinates of size about 1.
        scale = sum(torch.linalg.matrix_norm(half).item() for half in halves)
        assert cut == pytest.approx(truth, abs=1e-6 * scale)
        uncut = cross_of(rounded, [sign_of_rank(half, 24) for half in rounded])
        off_uncut.append(abs(uncut - truth) / abs(truth))
    assert statistics.median(off_uncut) > 0.1


def sign_of_rank(half: Tensor, rank: int) -> Tensor:
    """The matrix sign over the largest `rank` singular directions."""
    left, _, right = torch.linalg.svd(half, full_matrices=False)
    return left[:, :rank] @ right[:rank]


def cross_of(halves: list[Tensor], signs: list[Tensor]) -> float:
    """Each half against the other's direction, averaged."""
    return ((halves[0] * signs[1]).sum() + (halves[1] * signs[0]).sum()).item() / 2


SPECTRA = {
    "flat": lambda count: torch.ones(count),
    "linear": lambda count: torch.linspace(1.0, 0.01, count),
    "inverse square": lambda count: torch.arange(1.0, count + 1) ** -2,
    "geometric, past the cut": lambda count: 10.0 ** -torch.linspace(0.0, 7.0, count),
    "rank 5": lambda count: (torch.arange(count) < 5).float(),
    "zero": lambda count: torch.zeros(count),
}


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, max(shape), min(shape), generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(normal).Q
    return left[: shape[0]] @ torch.diag(values.double()) @ right[: shape[1]].mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_the_small_matrices_give_what_the_whole_halves_do(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for number, values in enumerate(SPECTRA.values()):
        for other, others in enumerate(SPECTRA.values()):
            first = with_spectrum(shape, values(min(shape)), seed=number).to(dtype)
            second = with_spectrum(shape, others(min(shape)), seed=100 + other).to(dtype)
            wide = [first.double(), second.double()]
            # The reference: each whole half against the other's whole matrix sign.
            expected = cross_of(wide, [matrix_sign(half) for half in wide])
            # s may cancel, so the error is relative to what it could be, the dual norms.
            scale = sum(torch.linalg.svdvals(half).sum().item() for half in wide) / 2
            found = nuclear_cross(first, second).item()
            assert abs(found - expected) <= 1e-10 * scale, (number, other)


def test_half_that_is_not_finite_gives_nan_and_spares_its_neighbours() -> None:
    first = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    second = first.flip(1).clone()
    expected = nuclear_cross(first[1], second[1])
    first[0, 1, 1] = torch.inf
    found = nuclear_cross(first, second)
    assert found[0].isnan()
    torch.testing.assert_close(found[1], expected)


def test_the_cut_is_the_one_stated() -> None:
    first = torch.eye(2)[None]
    second = torch.diag(torch.tensor([1.0, 1e-4]))[None]
    assert nuclear_cross(first, second, rank_cut=1e-3).item() == pytest.approx(
        (1.0 + (1.0 + 1e-4)) / 2
    )
    assert nuclear_cross(first, second).item() == pytest.approx((2.0 + (1.0 + 1e-4)) / 2)
    assert matrix_sign(second[0], rank_cut=1e-3)[1, 1] == 0.0
