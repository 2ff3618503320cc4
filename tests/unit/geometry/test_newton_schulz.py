"""Newton–Schulz steps: the published coefficients, what they do, and how matrices are handled."""

import functools

import pytest
import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.directions import matrix_sign
from gns_pretrain.geometry.newton_schulz import MUON, POLAR_EXPRESS, orthogonalize
from gns_pretrain.geometry.square_root import nearest_odd_polynomial


def with_singular_values(values: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(width, len(values), generator=generator)).Q
    return left * values @ right.mT


def test_one_muon_step_by_hand() -> None:
    # diag(3, 4) / 5 has singular values 0.6 and 0.8.
    a, b, c = MUON
    expected = [a * x + b * x**3 + c * x**5 for x in (0.6, 0.8)]
    result = orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), steps=1)
    torch.testing.assert_close(result, torch.diag(torch.tensor(expected)))


def test_polar_express_triples_are_the_best_quintics_for_their_intervals() -> None:
    # The first intervals are cut at 0.02407 of their upper end, and rescaled to be centred at 1, as
    # the paper's "cushion" says; each next interval is [p(lower), 2 - p(lower)].
    lower, upper, cushion = 1e-3, 1.0, 0.02407327424182761
    for published in POLAR_EXPRESS[:7]:
        start = max(lower, cushion * upper)
        on_unit, _ = nearest_odd_polynomial(start / upper, 3)
        triple = [c / upper**power for c, power in zip(on_unit, (1, 3, 5), strict=True)]

        def value(x: float, triple: list[float] = triple) -> float:
            return triple[0] * x + triple[1] * x**3 + triple[2] * x**5

        centre = (value(lower) + value(upper)) / 2.0 if start > lower else 1.0
        # Ten digits: the seventh interval is 1e-3 wide, which costs the exchange that many.
        assert published == pytest.approx([c / centre for c in triple], rel=1e-10)
        lower = value(lower) / centre
        upper = 2.0 - lower
    assert POLAR_EXPRESS[7] == (15 / 8, -10 / 8, 3 / 8)  # the limit: Newton–Schulz of order five


@pytest.mark.parametrize(
    ("coefficients", "smallest", "bounds"),
    [("muon", 2e-3, (0.68, 1.21)), ("polar_express", 1e-3, (0.84, 1.13))],
)
def test_five_steps_bring_singular_values_near_one(
    coefficients: str, smallest: float, bounds: tuple[float, float]
) -> None:
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), 48)
    values = values / torch.linalg.vector_norm(values)
    values = values.clamp_min(smallest)
    result = orthogonalize(with_singular_values(values, 80), coefficients=coefficients)
    spectrum = torch.linalg.svdvals(result)
    assert bounds[0] <= spectrum.min()
    assert spectrum.max() <= bounds[1]


def test_nine_polar_express_steps_give_the_matrix_sign() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix, steps=9, coefficients="polar_express")
    torch.testing.assert_close(result.double(), matrix_sign(matrix), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("coefficients", ["muon", "polar_express"])
def test_stacks_tall_matrices_and_scales_make_no_difference(coefficients: str) -> None:
    stack = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(stack, coefficients=coefficients)
    assert result.shape == stack.shape
    same = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # float32, 5 steps
    same(result[1, 2], orthogonalize(stack[1, 2], coefficients=coefficients))
    same(result.mT, orthogonalize(stack.mT, coefficients=coefficients))
    same(result, orthogonalize(1e-6 * stack, coefficients=coefficients))


def test_bfloat16_products_stay_near_float32_ones_and_keep_the_input_dtype() -> None:
    matrix = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    coarse = orthogonalize(matrix, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32
    # bfloat16 has 8 bits: 2^-8 a product, amplified by at most 3.4 a step on small values.
    assert (coarse - orthogonalize(matrix)).abs().max() < 0.05
    assert orthogonalize(matrix.bfloat16()).dtype == torch.bfloat16


def test_zeros_stay_zero() -> None:
    assert torch.count_nonzero(orthogonalize(torch.zeros(2, 3, 4))) == 0


def test_unknown_coefficients_and_no_steps_are_refused() -> None:
    with pytest.raises(InputError, match="coefficients=cubic is unknown; use muon"):
        orthogonalize(torch.eye(2), coefficients="cubic")
    with pytest.raises(InputError, match="steps=0 must be at least 1"):
        orthogonalize(torch.eye(2), steps=0)
