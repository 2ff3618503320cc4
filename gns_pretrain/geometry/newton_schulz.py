"""Newton–Schulz orthogonalisation: nearly the matrix sign, by matmuls alone.

One step replaces X by a X + b (X X^T) X + c (X X^T)^2 X: each singular value x becomes
a x + b x^3 + c x^5, and the singular vectors stay. A few steps bring all but the smallest near 1.
"""

import torch
from torch import Tensor

from gns_pretrain.errors import InputError

Triple = tuple[float, float, float]

# Muon's quintic: steep at zero, so small singular values grow 3.4-fold a step. It does not converge
# to 1: after five steps everything above 2e-3 of ||X||_F lies between 0.68 and 1.21.
MUON: Triple = (3.4445, -4.7750, 2.0315)

# Polar Express (arXiv:2505.16932, Algorithm 1): each triple is the best quintic for the interval
# that the one before leaves, from [1e-3, 1] on; further steps repeat the last one.
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

# Rounding in bfloat16 can push a singular value past the interval's end, where these triples
# diverge: the paper runs all but the last one on X / 1.01.
_POLAR_EXPRESS_MARGIN = 1.01


def orthogonalize(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "muon",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Bring the singular values of each matrix near 1 and keep its singular vectors.

    Args:
        matrices: [..., m, n], any scale; tall ones are transposed meanwhile, so that the matmuls
            are on the smaller side. A matrix of zeros stays zero.
        coefficients: "muon" (one triple for every step) or "polar_express" (one for each).
        dtype: of the matmuls; default bfloat16 on an accelerator, float32 on a CPU.

    Returns:
        Same shape and dtype as `matrices`; near U V^T of the reduced singular value decomposition.

    Raises:
        InputError: unknown coefficients, or fewer than one step.
    """
    schedule = _schedule(coefficients, steps)
    if dtype is None:
        dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    # The Frobenius norm bounds the largest singular value; bfloat16 could not sum its squares.
    sum_dtype = torch.promote_types(wide.dtype, torch.float32)
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=sum_dtype)
    margin = _POLAR_EXPRESS_MARGIN if coefficients == "polar_express" else 1.0
    unit = (wide / torch.where(norm > 0, margin * norm, torch.inf)).to(dtype)
    x = unit.reshape(-1, *wide.shape[-2:])  # [K, m, n], m <= n
    for a, b, c in schedule:
        gram = x @ x.mT
        quadratic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b XX^T + c (XX^T)^2
        x = torch.baddbmm(x, quadratic, x, beta=a)
    x = x.reshape(wide.shape).to(matrices.dtype)
    return x.mT if tall else x


def _schedule(coefficients: str, steps: int) -> list[Triple]:
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1; 5 is usual")
    if coefficients == "muon":
        return [MUON] * steps
    if coefficients == "polar_express":
        margin = _POLAR_EXPRESS_MARGIN
        damped = [(a / margin, b / margin**3, c / margin**5) for a, b, c in POLAR_EXPRESS[:-1]]
        return damped[:steps] + [POLAR_EXPRESS[-1]] * (steps - len(damped))
    raise InputError(f"coefficients={coefficients} is unknown; use muon or polar_express")
