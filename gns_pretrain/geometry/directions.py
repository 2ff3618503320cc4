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
    if not _SMALLEST_RANK_CUT <= rank_cut < 1.0:
        raise InputError(
            f"rank_cut={rank_cut} must be at least {_SMALLEST_RANK_CUT} and below 1: a Gram matrix "
            f"does not resolve smaller singular values; use {RANK_CUT}"
        )
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if tall else matrix).double()
    finite = torch.isfinite(wide).all(-1).all(-1)[..., None, None]
    # Eigenvalue solvers raise on NaN; zeros stand in until the end.
    eigenvalues, vectors = torch.linalg.eigh(smaller_side_gram(torch.where(finite, wide, 0.0)))
    largest = eigenvalues[..., -1:]
    kept = eigenvalues > rank_cut**2 * largest
    inverse_root = torch.where(kept, eigenvalues, 1.0).rsqrt() * kept
    sign = (vectors * inverse_root.unsqueeze(-2)) @ (vectors.mT @ wide)
    sign = torch.where(finite, sign, torch.nan)
    return sign.mT if tall else sign
