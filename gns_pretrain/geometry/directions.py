"""Steepest-descent directions p = argmax <g, p> over ||p|| <= 1 (arXiv:2602.03001, Eq. 2).

Each satisfies <g, p> = dual norm of g; a gradient of zero has no direction and gives zero. The
sign is torch's own. The Euclidean one, g / ||g||_2, needs the norm over all weights and stands
where that is known.
"""

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import smaller_side_gram

# Singular values below this share of the largest count as zero. Rounding fills the null space of a
# float32 gradient with singular values of about 1e-7 to 1e-6 of the largest, all of them noise.
RANK_CUT = 1e-5

# The float64 Gram squares singular values, so half of its 16 digits are left for their ratios.
_SMALLEST_RANK_CUT = 1e-7


def matrix_sign(matrix: Tensor, *, rank_cut: float = RANK_CUT) -> Tensor:
    """P = U_r V_r^T of the singular value decomposition G = U S V^T, the unit ball of S_inf.

        P = U_r diag(1 / s_r) U_r^T G    with G G^T = U S^2 U^T and s_r > rank_cut * s_1

    The matrix sign gives every direction the same weight however small its singular value, so
    directions of pure rounding must be cut, or each adds a unit step. The eigenvectors of the
    smaller side's float64 Gram are those of the SVD, in a third of its time on a wide matrix.

    Args:
        matrix: [..., m, n], float32 or float64.
        rank_cut: relative to the largest singular value, at least 1e-7.

    Returns:
        Same shape, float64; its rank is the number of singular values above the cut. NaN for a
        matrix that is not finite.

    Raises:
        InputError: a rank cut that the float64 Gram cannot resolve.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if tall else matrix).double()
    finite = torch.isfinite(wide).all(-1).all(-1)[..., None, None]
    # Eigenvalue solvers raise on NaN; zeros stand in until the end.
    gram = smaller_side_gram(torch.where(finite, wide, 0.0))
    inverse, vectors = _inverse_singular_values(gram, rank_cut)
    sign = (vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ wide)
    sign = torch.where(finite, sign, torch.nan)
    return sign.mT if tall else sign


def matrix_sign_product(product: Tensor, gram: Tensor, *, rank_cut: float = RANK_CUT) -> Tensor:
    """<F, P> of a matrix F and the matrix sign P of G, from matrices of the smaller side alone.

        <F, P> = sum_i u_i^T F G^T u_i / s_i    with G G^T = U S^2 U^T and s_i > rank_cut * s_1

    For tall matrices F^T G and G^T G take the place of F G^T and G G^T. u^T M u = u^T M^T u, so
    that G F^T serves as well.

    Args:
        product: [..., s, s], float64; F G^T.
        gram: same shape; G G^T.
        rank_cut: as in `matrix_sign`.

    Returns:
        [...], float64; NaN where either matrix is not finite.

    Raises:
        InputError: a rank cut that the float64 Gram cannot resolve.
    """
    finite = torch.isfinite(gram + product).all(-1).all(-1)
    gram = torch.where(finite[..., None, None], gram, 0.0)  # as in `matrix_sign`
    inverse, vectors = _inverse_singular_values(gram, rank_cut)
    along = (vectors * (product @ vectors)).sum(-2)  # u_i^T F G^T u_i
    return torch.where(finite, (along * inverse).sum(-1), torch.nan)


def _inverse_singular_values(gram: Tensor, rank_cut: float) -> tuple[Tensor, Tensor]:
    """1 / s_i where s_i > rank_cut * s_1, else 0, [..., s]; and the vectors u_i, in columns."""
    if not _SMALLEST_RANK_CUT <= rank_cut < 1.0:
        raise InputError(
            f"rank_cut={rank_cut} must be at least {_SMALLEST_RANK_CUT} and below 1: a Gram matrix "
            f"does not resolve smaller singular values; use {RANK_CUT}"
        )
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > rank_cut**2 * eigenvalues[..., -1:]
    return torch.where(kept, eigenvalues, 1.0).rsqrt() * kept, vectors
