"""Odd polynomials nearest to the sign function, and chains of them (arXiv:2505.16932, Section 3).

An odd polynomial p applied to the singular values of a matrix needs only products of matrices. A
chain p_K(...p_1(x)) whose links are each optimal on the interval that the one before leaves is the
best chain there is, and pulls every x in [lower, 1] to 1 within a known error.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_MAX_EXCHANGES = 50


@dataclass(frozen=True)
class SignChain:
    """Polynomials to apply in turn, and how near to 1 the last one ends.

    Args:
        polynomials: for each link c_0, c_1, ... of c_0 x + c_1 x^3 + c_2 x^5 + ...
        lower: the smallest x for which the error holds.
        error: worst |1 - chain(x)| on [lower, 1]; on [0, lower] the chain lies in [0, 1 + error].
    """

    polynomials: tuple[tuple[float, ...], ...]
    lower: float
    error: float


def nearest_odd_polynomial(lower: float, num_terms: int) -> tuple[list[float], float]:
    """Minimise max |1 - p(x)| on [lower, 1] over odd p of degree 2 num_terms - 1 (Remez exchange).

    The best p is the one whose error takes its largest size, with alternating sign, at
    num_terms + 1 points: the ends of the interval and the roots of p' between them.

    Args:
        lower: in (0, 1).
        num_terms: at least 2.

    Returns:
        Coefficients of x, x^3, ..., and the error; computed in float64 on the CPU.
    """
    powers = torch.arange(1, 2 * num_terms, 2, dtype=torch.float64)
    signs = (-1.0) ** torch.arange(num_terms + 1, dtype=torch.float64)
    steps = torch.arange(num_terms + 1, dtype=torch.float64) / num_terms
    points = lower + (1.0 - lower) * (0.5 * math.pi * steps).sin()
    for _ in range(_MAX_EXCHANGES):
        system = torch.cat([points[:, None] ** powers, signs[:, None]], dim=1)
        solution = torch.linalg.solve(system, torch.ones(num_terms + 1, dtype=torch.float64))
        coefficients, error = solution[:-1], abs(solution[-1].item())
        stationary = _roots(coefficients * powers).clamp(lower**2, 1.0).sqrt()
        ends = points.new_tensor([lower, 1.0])
        moved = torch.cat([ends, stationary]).sort().values
        if (moved - points).abs().max() < 1e-9:
            break
        points = moved
    return coefficients.tolist(), error


@cache
def sign_chain(lower: float, num_terms: int, num_links: int) -> SignChain:
    """The best chain of `num_links` polynomials of `num_terms` terms on [lower, 1].

    All links but the last are scaled to a largest value of 1, so that each starts on [lower_k, 1].
    """
    polynomials = []
    reached, error = lower, 1.0
    for link in range(num_links):
        coefficients, error = nearest_odd_polynomial(reached, num_terms)
        reached = (1.0 - error) / (1.0 + error)
        scale = 1.0 if link == num_links - 1 else 1.0 + error
        polynomials.append(tuple(coefficient / scale for coefficient in coefficients))
    return SignChain(tuple(polynomials), lower, error)


def _roots(coefficients: Tensor) -> Tensor:
    """Real parts of the roots of sum_k coefficients[k] z^k, from the companion matrix."""
    degree = coefficients.numel() - 1
    companion = torch.diag(torch.ones(degree - 1, dtype=torch.float64), diagonal=-1)
    companion[:, -1] = -coefficients[:-1] / coefficients[-1]
    return torch.linalg.eigvals(companion).real
