"""Steepest-descent directions; the matrix sign against singular value decompositions."""

import pytest
import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.directions import matrix_sign


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_directions_by_hand() -> None:
    gradient = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    signs = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(matrix_sign(gradient), signs)


def test_a_zero_gradient_has_no_direction() -> None:
    assert torch.count_nonzero(matrix_sign(torch.zeros(2, 3))) == 0


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_matrix_sign_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    stack = normal(3, *shape)
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    # The Gram route loses the condition number (below 1e3 here) in digits, out of 16.
    torch.testing.assert_close(matrix_sign(stack), left @ right, rtol=0.0, atol=1e-10)


def test_the_cut_leaves_out_singular_values_below_it() -> None:
    left, right = torch.linalg.qr(normal(5, 5)).Q, torch.linalg.qr(normal(8, 5, seed=1)).Q
    matrix = left * torch.tensor([1.0, 0.5, 1e-3, 1e-4, 1e-6], dtype=torch.float64) @ right.mT
    torch.testing.assert_close(
        matrix_sign(matrix, rank_cut=3e-4), left[:, :3] @ right[:, :3].mT, rtol=0.0, atol=1e-9
    )
    torch.testing.assert_close(
        matrix_sign(matrix), left[:, :4] @ right[:, :4].mT, rtol=0.0, atol=1e-7
    )


def test_the_sign_of_a_rank_deficient_float32_matrix_needs_the_cut() -> None:
    # A gradient of 8 tokens, 32 wide: rank 8 and 24 singular values that are rounding.
    exact = normal(32, 8) @ normal(8, 48, seed=1)
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    truth = left[:, :8] @ right[:8]
    torch.testing.assert_close(matrix_sign(exact.float()), truth, rtol=0.0, atol=1e-5)
    left, _, right = torch.linalg.svd(exact.float(), full_matrices=False)
    # Uncut, each of the 24 directions of rounding adds a unit step: sqrt(24) in Frobenius norm.
    assert torch.linalg.matrix_norm(left @ right - truth) > 4.8


def test_a_matrix_that_is_not_finite_has_nan_for_a_sign_and_spares_its_neighbours() -> None:
    stack = normal(2, 3, 4)
    stack[0, 1, 1] = torch.inf
    signs = matrix_sign(stack)
    assert signs[0].isnan().all()
    torch.testing.assert_close(signs[1], matrix_sign(stack[1]))


@pytest.mark.parametrize("rank_cut", [0.0, 1e-8, 1.0])
def test_a_cut_that_a_gram_cannot_resolve_is_refused(rank_cut: float) -> None:
    with pytest.raises(InputError, match=r"rank_cut=.*at least 1e-07"):
        matrix_sign(torch.eye(2), rank_cut=rank_cut)
