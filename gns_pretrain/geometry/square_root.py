"""tr C^(1/2) for stacks of matrices: by eigenvalues, or by matmuls alone.

    tr C^(1/2) = tr(A h(A)),  A = C^(1/2),  h an odd polynomial that is 1 on the spectrum of A

h is a chain p_K(... p_1(x)) of odd polynomials, each the nearest to 1 on the interval that the one
before leaves, which makes the best chain there is (arXiv:2505.16932, Section 3). Both A h(A) and
h(A)^2 follow from C by matmuls, so no eigenvalue is computed. 36 matmuls and a Cholesky
factorisation in float64 replace an eigenvalue problem: the right trade on a GPU, whose eigenvalue
solvers are slow and take matrices one by one, the wrong one on a CPU, where eigenvalues cost as
much as three to ten matmuls. Hence "auto".
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from numpy.polynomial.polynomial import polyroots
from torch import Tensor

from gns_pretrain.errors import InputError

MODES = ("auto", "iterative", "exact")

# A matrix whose proven relative error exceeds this takes the exact route.
TOLERANCE = 1e-3

# Square roots of eigenvalues below this share of ||C||_F^(1/2) are not resolved, only bounded.
_LOWER = 7e-7
_NUM_TERMS, _NUM_LINKS = 5, 8  # degree 9 gains most per matmul; eight links end within 1e-4 of 1

# Added to C / ||C||_F: rounding leaves zeros near -1e-16, and the chain diverges below zero.
_SHIFT = 1e-13

_CHUNK_ENTRIES = 2**25  # 256 MiB in float64; the iteration holds about six such tensors
_MAX_EXCHANGES = 50


class SquareRootTraces(NamedTuple):
    """Values for a stack of k matrices, and how many the iteration could not prove."""

    values: Tensor  # [k], float64, on the matrices' device; NaN for a matrix that is not finite
    num_fallbacks: int  # matrices that took the exact route after all; 0 in mode "exact"


class SignChain(NamedTuple):
    """Polynomials to apply one after the other, and how near to 1 the last one ends."""

    polynomials: tuple[tuple[float, ...], ...]  # of each link c_0 x + c_1 x^3 + c_2 x^5 + ...
    error: float  # worst |1 - chain(x)| on [lower, 1]; below, the chain lies in [0, 1 + error]


def default_mode(device: torch.device) -> str:
    """Return "exact" on a CPU and "iterative" on anything else, by what is faster there."""
    return "exact" if device.type == "cpu" else "iterative"


def smaller_side_gram(matrix: Tensor) -> Tensor:
    """G G^T, or G^T G for a tall one: the Gram of the smaller side, in the matrix's dtype.

    Args:
        matrix: [..., m, n]; float64 where small singular values count, because a Gram squares them.

    Returns:
        [..., s, s] with s = min(m, n). Both sides have the same nonzero eigenvalues.
    """
    return matrix.mT @ matrix if matrix.shape[-2] > matrix.shape[-1] else matrix @ matrix.mT


def add_smaller_side_gram(total: Tensor, matrix: Tensor) -> None:
    """Add a matrix's `smaller_side_gram` to a total [s, s] of its dtype, in place."""
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    total.addmm_(wide, wide.mT)


def trace_square_root(grams: Tensor, *, mode: str = "auto") -> SquareRootTraces:
    """tr C^(1/2) of each symmetric positive semi-definite matrix of a stack.

    Of a Gram G G^T it is the nuclear norm ||G||_S1: singular values below 1e-8 of the largest are
    lost, which costs at most min(m, n) * 1e-8.

    Args:
        grams: [k, m, m], float32 or float64; computed in float64. A Gram accumulated in float32 has
            eigenvalues wrong by 1e-7 of the largest, negative ones among them: those count as zero,
            and in mode "iterative" such a matrix takes the exact route.
        mode: "exact" (eigenvalues), "iterative" (relative error at most `TOLERANCE`, proven for
            each matrix or else the exact route; one host synchronisation), "auto" (`default_mode`).

    Raises:
        InputError: an unknown mode.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode} is unknown; use one of {', '.join(MODES)}")
    if (default_mode(grams.device) if mode == "auto" else mode) == "exact":
        grams, norms, usable = _usable(grams)
        return SquareRootTraces(torch.where(usable, _exact(grams), norms * 0.0), 0)
    values, proven = iterated_traces(grams)
    fallbacks = (~proven).nonzero().squeeze(-1)  # the one synchronisation
    if len(fallbacks):
        values[fallbacks] = _exact(grams[fallbacks].double())
    return SquareRootTraces(values, len(fallbacks))


def iterated_traces(grams: Tensor) -> tuple[Tensor, Tensor]:
    """tr C^(1/2) by the iteration alone, chunk by chunk; the host waits for nothing.

    Args:
        grams: as in `trace_square_root`.

    Returns:
        Values [k], float64, NaN for a matrix that is not finite; and [k], bool: whether that one is
        within `TOLERANCE` or not a number, so that it needs no eigenvalues.
    """
    grams, norms, usable = _usable(grams)
    scales = torch.where(usable, norms, 1.0)
    chunk = max(1, _CHUNK_ENTRIES // grams[0].numel()) if len(grams) else 1
    parts = [
        _proven_trace(part / scale[:, None, None])
        for part, scale in zip(grams.split(chunk), scales.split(chunk), strict=True)
    ]
    values = torch.cat([value for value, _ in parts]) * scales.sqrt()
    proven = torch.cat([proven for _, proven in parts])
    return torch.where(usable, values, norms * 0.0), proven | ~usable


def _usable(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grams in float64, with identities for those without roots; their norms, and which have some.

    Eigenvalue solvers raise on NaN; the identity stands in until the values are masked.
    """
    grams = grams.double()
    norms = torch.linalg.matrix_norm(grams)
    usable = torch.isfinite(norms) & (norms > 0)
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    return torch.where(usable[:, None, None], grams, identity), norms, usable


def _exact(grams: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(grams).clamp_min(0.0).sqrt().sum(dim=-1)


def _proven_trace(grams: Tensor) -> tuple[Tensor, Tensor]:
    """tr C^(1/2) by the chain for ||C||_F = 1, and whether its error is proven within tolerance.

    With l = `_LOWER`, d the chain's error above it, s = `_SHIFT` and T = tr C^(1/2) >= 1: a root
    above l errs by at most d times itself, one below by at most l, and the shift adds at most
    s^(1/2) to each, so the relative error is at most d + m (l + s^(1/2)) / T. All of this holds if
    C + s I has no negative eigenvalue, which a Cholesky factorisation shows.
    """
    chain = sign_chain(_LOWER, _NUM_TERMS, _NUM_LINKS)
    width = grams.shape[-1]
    shifted = grams + _SHIFT * torch.eye(width, dtype=grams.dtype, device=grams.device)
    positive = torch.linalg.cholesky_ex(shifted).info == 0
    trace = _chain_trace(shifted, chain.polynomials)
    bound = chain.error + width * (_LOWER + _SHIFT**0.5) / trace
    return trace, positive & (bound <= TOLERANCE)


def _chain_trace(gram: Tensor, polynomials: tuple[tuple[float, ...], ...]) -> Tensor:
    """tr(A h(A)) for A = gram^(1/2), h the chain; [k].

    Updated by each link: `signed` = A h(A), from C to about A, and `square` = h(A)^2, from C to
    about the identity. A link p(x) = x q(x^2) multiplies the first by q(square) and the second by
    q(square)^2.
    """
    square, signed = gram, gram
    for coefficients in polynomials[:-1]:
        quotient = _quartic(square, coefficients)
        half = square @ quotient
        signed = half if signed is square else signed @ quotient
        square = half @ quotient
    return _quartic_trace(signed, square, polynomials[-1])


def _quartic(matrix: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """q(M) = c_0 I + c_1 M + ... + c_4 M^4 with two matmuls."""
    c0, c1, c2, c3, c4 = coefficients
    power = matrix @ matrix
    low = torch.add(c1 * matrix, power, alpha=c2)
    low.diagonal(dim1=-2, dim2=-1).add_(c0)
    return torch.baddbmm(low, power, torch.add(c3 * matrix, power, alpha=c4))


def _quartic_trace(weight: Tensor, matrix: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """tr(W q(M)) for W and M that commute, with two matmuls; [k]."""
    power = matrix @ matrix
    weighted = weight @ power
    traces = (
        weight.diagonal(dim1=-2, dim2=-1).sum(-1),
        (weight * matrix).sum((-2, -1)),
        (weight * power).sum((-2, -1)),
        (weighted * matrix).sum((-2, -1)),
        (weighted * power).sum((-2, -1)),
    )
    parts = [c * trace for c, trace in zip(coefficients, traces, strict=True)]
    return torch.stack(parts).sum(dim=0)


@cache
def sign_chain(lower: float, num_terms: int, num_links: int) -> SignChain:
    """Build the best chain of `num_links` polynomials of `num_terms` terms on [lower, 1].

    All links but the last are scaled to a largest value of 1, so that each starts on [lower_k, 1].
    """
    polynomials = []
    reached, error = lower, 1.0
    for link in range(num_links):
        coefficients, error = nearest_odd_polynomial(reached, num_terms)
        reached = (1.0 - error) / (1.0 + error)
        scale = 1.0 if link == num_links - 1 else 1.0 + error
        polynomials.append(tuple(coefficient / scale for coefficient in coefficients))
    return SignChain(tuple(polynomials), error)


def nearest_odd_polynomial(lower: float, num_terms: int) -> tuple[list[float], float]:
    """Minimise max |1 - p(x)| on [lower, 1] over odd p of degree 2 num_terms - 1 (Remez exchange).

    The best p is the one whose error takes its largest size, with alternating sign, at
    num_terms + 1 points: the ends of the interval and the roots of p' between them.

    `lower` lies in (0, 1), and there are at least 2 terms.

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
        roots = torch.from_numpy(polyroots((coefficients * powers).numpy()).real)
        stationary = roots.clamp(lower**2, 1.0).sqrt()
        moved = torch.cat([points.new_tensor([lower, 1.0]), stationary]).sort().values
        if (moved - points).abs().max() < 1e-9:
            break
        points = moved
    return coefficients.tolist(), error
