"""Norms over many coordinates, as exact as float64 sums and without a float64 copy of a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of float32 values that a CPU copies to float64 at a time: 2 MiB, which stay in its cache.
_PIECE_ENTRIES = 2**18


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Vector norm of each tensor over all its entries: [k], float64 on a CPU, float32 on a GPU.

    Args:
        tensors: k >= 1 of any shapes, all on one device; an empty one has norm 0.
        order: 1 or 2.
    """
    if any(t.device.type != "cpu" for t in tensors):
        # GPUs add in trees; for float64 they would write a copy first.
        return torch.stack(torch._foreach_norm(list(tensors), order, dtype=torch.float32))
    # A CPU adds up in the order of memory: of 16 M coordinates float32 loses 2e-4, and each layout
    # another share. For float64 it writes a copy first, here of a piece.
    pieces = [t.reshape(-1).split(_PIECE_ENTRIES) for t in tensors]
    of_pieces = torch.stack(
        torch._foreach_norm([p for each in pieces for p in each], order, dtype=torch.float64)
    )
    if len(of_pieces) == len(pieces):
        return of_pieces
    joined = of_pieces.split([len(each) for each in pieces])
    return torch.stack(torch._foreach_norm(joined, order))
