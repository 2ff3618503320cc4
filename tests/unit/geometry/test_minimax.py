"""Odd polynomials near the sign function: optimal, and chains that keep their stated error."""

import pytest
import torch
from torch import Tensor

from gns_pretrain.geometry.square_root import nearest_odd_polynomial, sign_chain


def evaluate(coefficients: tuple[float, ...] | list[float], x: Tensor) -> Tensor:
    return sum(
        (c * x ** (2 * power + 1) for power, c in enumerate(coefficients)), torch.zeros_like(x)
    )


@pytest.mark.parametrize("lower", [0.01, 0.3, 0.8])
def test_the_best_cubic_has_its_closed_form(lower: float) -> None:
    # p(x) = a x - b x^3 has the same error E at lower and 1 and the opposite one at its maximum
    # x* = sqrt(a / 3b). Equal values at both ends: a = b (1 + lower + lower^2).
    ratio = 1.0 + lower + lower**2
    end, top = ratio - 1.0, 2.0 * (ratio / 3.0) ** 1.5  # p / b at 1 and at x*
    scale = 2.0 / (end + top)
    coefficients, error = nearest_odd_polynomial(lower, 2)
    assert coefficients == pytest.approx([scale * ratio, -scale], rel=1e-9)
    assert error == pytest.approx((top - end) / (top + end), rel=1e-9)


@pytest.mark.parametrize(("lower", "num_terms"), [(1e-6, 5), (0.1, 5), (0.02, 3)])
def test_the_error_takes_its_largest_size_with_alternating_sign(
    lower: float, num_terms: int
) -> None:
    coefficients, error = nearest_odd_polynomial(lower, num_terms)
    x = torch.linspace(lower, 1.0, 200_001, dtype=torch.float64)
    deviation = evaluate(coefficients, x) - 1.0
    assert deviation.abs().max().item() == pytest.approx(error, rel=1e-9)
    # Chebyshev: num_terms + 1 alternations make it the best of all.
    extreme = deviation[deviation.abs() > (1.0 - 1e-6) * error].sign()
    assert (extreme[1:] != extreme[:-1]).sum() == num_terms


def test_a_chain_keeps_its_stated_error_and_stays_positive_below_it() -> None:
    lower = 7e-7
    chain = sign_chain(lower, 5, 8)
    x = torch.logspace(-9, 0, 100_001, dtype=torch.float64)
    y = x
    for coefficients in chain.polynomials:
        y = evaluate(coefficients, y)
    # Coefficients up to 321 leave rounding of 1e-13 a link.
    assert (y[x >= lower] - 1.0).abs().max().item() == pytest.approx(chain.error, rel=1e-3)
    assert chain.error < 1e-4
    assert 0.0 < y.min() <= y.max() < 1.0 + 1.001 * chain.error
