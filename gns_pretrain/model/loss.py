"""Next-token cross-entropy that never holds the logits of more than a slice of the tokens.

Legend: N tokens, D model width, V vocabulary, S tokens in a slice.

With V = 128,256, one micro-batch of 16 x 2048 tokens has 16.8 GB of float32 logits. Both ways
below compute a slice's logits, its loss and its share of the gradients, and reuse the memory:

- torch's linear_cross_entropy (2.13), for float32 and float64. Its own choice of S is one token
  where V / D is 1000, fifty times slower than slices of 512 on a CPU; so S is given.
- `_SlicedCrossEntropy` for older versions of torch, and for bfloat16, where torch returns the loss
  itself in bfloat16: 8.81 instead of 8.77 in a trial.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# On CPUs larger slices leave the cache; on GPUs each slice adds a [V, D] gradient in float32, which
# a larger one spreads over more tokens.
CPU_SLICE_TOKENS = 512
GPU_SLICE_TOKENS = 2048

_HAS_LINEAR_CROSS_ENTROPY = hasattr(torch.nn, "LinearCrossEntropyOptions")


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets under softmax(hidden @ weight.T).

        loss = 1/N * sum_n (log sum_v exp(h_n . w_v) - h_n . w_(t_n))

    The gradients are computed in the forward pass, slice by slice, so nothing is recomputed and
    the backward pass, which may run once, only scales them. The softmax is taken in float32
    (float64 for float64 inputs).

    Args:
        hidden: [N, D], any float dtype.
        weight: [V, D], hidden's dtype.
        targets: [N], int64, each in [0, V).

    Returns:
        [], float32 (float64 for float64 inputs); nats per token.
    """
    slice_tokens = GPU_SLICE_TOKENS if hidden.is_cuda else CPU_SLICE_TOKENS
    if _HAS_LINEAR_CROSS_ENTROPY and hidden.dtype in (torch.float32, torch.float64):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=slice_tokens)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)
    with_gradients = torch.is_grad_enabled()
    loss: Tensor = _SlicedCrossEntropy.apply(hidden, weight, targets, slice_tokens, with_gradients)
    return loss


class _SlicedCrossEntropy(torch.autograd.Function):
    """`next_token_loss` in plain torch; one logits buffer serves every slice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        slice_tokens: int,
        with_gradients: bool,
    ) -> Tensor:
        """Sum the loss over slices, and the gradients of that sum if they will be needed."""
        num_tokens = hidden.shape[0]
        softmax_dtype = torch.promote_types(hidden.dtype, torch.float32)
        buffer = hidden.new_empty(
            (min(slice_tokens, num_tokens), weight.shape[0]), dtype=softmax_dtype
        )
        loss = hidden.new_zeros((), dtype=softmax_dtype)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=softmax_dtype) if with_gradients else None
        for start in range(0, num_tokens, slice_tokens):
            rows = slice(start, min(start + slice_tokens, num_tokens))
            logits = buffer[: rows.stop - start]  # [S, V]
            if hidden.dtype == softmax_dtype:
                torch.mm(hidden[rows], weight.T, out=logits)
            else:
                logits.copy_(hidden[rows] @ weight.T)
            slice_loss = _loss_and_logit_gradient_(logits, targets[rows, None])
            loss += slice_loss
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = logits.to(weight.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                if grad_weight.dtype == weight.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                else:
                    grad_weight += grad_logits.T @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.num_tokens = num_tokens
        return loss / num_tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the sum to those of the mean."""
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.num_tokens
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _loss_and_logit_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of a slice; leaves d loss / d logits = softmax - one_hot in the logits [S, V]."""
    logits -= logits.amax(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets)
    normalizer = logits.exp_().sum(dim=1, keepdim=True)
    logits /= normalizer
    logits.scatter_add_(1, targets, torch.full_like(target_logits, -1.0))
    return (normalizer.log() - target_logits).sum()
