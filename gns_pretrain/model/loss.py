"""Next-token cross-entropy that never holds the logits of more than a slice of the tokens.

Legend: N tokens, D model width, V vocabulary, S tokens in a slice.

With V = 128,256, one micro-batch of 16 x 2048 tokens has 16.8 GB of float32 logits. Both ways
below compute a slice's logits, its loss and its share of the gradients, and reuse the memory:

- torch's linear_cross_entropy (2.13), for float32 and float64. Its own choice of S is one token
  where V / D is 1000, fifty times slower than slices of 512 on a CPU; so S is given.
- `_SlicedCrossEntropy` for older versions of torch, and for bfloat16, where torch returns the loss
  itself in bfloat16: 8.81 instead of 8.77 in a trial. A slice's logits stay in the inputs' dtype
  and become their own gradient in place. Compiled, that moves 6 bytes for each bfloat16 logit
  beside the matmuls: two reads and one write.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# On CPUs larger slices leave the cache; on GPUs each slice adds a [V, D] gradient in float32, which
# a larger one spreads over more tokens.
CPU_SLICE_TOKENS = 512
GPU_SLICE_TOKENS = 2048

_HAS_LINEAR_CROSS_ENTROPY = hasattr(torch.nn, "LinearCrossEntropyOptions")


# `logit_gradients_`, or the same compiled.
LogitGradients = Callable[[Tensor, Tensor], Tensor]


def logit_gradients_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn a slice's logits, in place, into the gradient of its summed loss: softmax - one_hot.

    Written for the compiler, which makes one pass for the sum and one for the gradient of it.

    Args:
        logits: [S, V]; the softmax is taken in float32 at least.
        targets: [S, 1], int64.

    Returns:
        [S, 1], float32 at least; the targets' log-probabilities.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(dim=1, keepdim=True)
    normalizer = (wide - largest).exp_().sum(dim=1, keepdim=True)
    log_probabilities = wide.gather(1, targets) - largest - normalizer.log()
    # Exponentials again: a compiler keeps those of the sum otherwise, 8 bytes a logit.
    wide.sub_(largest).exp_().div_(normalizer)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets
    logits.copy_(wide.sub_(is_target.to(wide.dtype)))
    return log_probabilities


def compiled_logit_gradients_(backend: str = "inductor") -> LogitGradients:
    """Compile `logit_gradients_`: one graph for slices of any number of tokens."""
    compiled: LogitGradients = torch.compile(logit_gradients_, backend=backend)

    def gradients(logits: Tensor, targets: Tensor) -> Tensor:
        for tensor in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, targets)

    return gradients


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logit_gradients: LogitGradients = logit_gradients_,
) -> Tensor:
    """Mean negative log-likelihood of the targets under softmax(hidden @ weight.T).

        loss = 1/N * sum_n (log sum_v exp(h_n . w_v) - h_n . w_(t_n))

    The gradients are computed in the forward pass, slice by slice, so nothing is recomputed and
    the backward pass, which may run once, only scales them. The softmax is taken in float32
    (float64 for float64 inputs).

    Args:
        hidden: [N, D], any float dtype.
        weight: [V, D], hidden's dtype.
        targets: [N], int64, each in [0, V).
        logit_gradients: `logit_gradients_`, or `compiled_logit_gradients_()`.

    Returns:
        [], float32 (float64 for float64 inputs); nats per token.
    """
    slice_tokens = GPU_SLICE_TOKENS if hidden.is_cuda else CPU_SLICE_TOKENS
    if _HAS_LINEAR_CROSS_ENTROPY and hidden.dtype in (torch.float32, torch.float64):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=slice_tokens)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)
    loss: Tensor = _SlicedCrossEntropy.apply(
        hidden, weight, targets, slice_tokens, logit_gradients, torch.is_grad_enabled()
    )
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
        logit_gradients: LogitGradients,
        with_gradients: bool,
    ) -> Tensor:
        """Sum the loss over slices, and the gradients of that sum if they will be needed."""
        num_tokens = hidden.shape[0]
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        buffer = hidden.new_empty(min(slice_tokens, num_tokens), weight.shape[0])
        loss = hidden.new_zeros((), dtype=sum_dtype)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if with_gradients else None
        for start in range(0, num_tokens, slice_tokens):
            rows = slice(start, min(start + slice_tokens, num_tokens))
            logits = buffer[: rows.stop - start]  # [S, V]
            torch.mm(hidden[rows], weight.T, out=logits)
            loss -= logit_gradients(logits, targets[rows, None]).sum()
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
                add_matmul_(grad_weight, logits.T, hidden[rows])
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.num_tokens = num_tokens
        return loss / num_tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the sum to those of the mean."""
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.num_tokens
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


def add_matmul_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total that may be of a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # nothing is rounded to the factors' dtype on the way
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
