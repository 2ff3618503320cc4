"""Llama 3 as a plain nn.Module: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Legend: B sequences, T tokens in each, D model width, H query heads, K key and value heads,
d head width, F feed-forward width, V vocabulary.

Parameters keep their own dtype (float32 master weights) and are cast where they are used to the
activations' dtype, `Llama.compute_dtype`; under FSDP2's mixed precision they arrive in that dtype
and the cast is free. Nothing here knows of ranks.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.loss import (
    LogitGradients,
    compiled_logit_gradients_,
    logit_gradients_,
    next_token_loss,
)
from gns_pretrain.model.parametrization import initial_factor
from gns_pretrain.model.roles import Role
from gns_pretrain.model.settings import OurModel

FLEX_HEAD_DIM = 16  # the narrowest head of flex attention's kernels


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per token of each pair of coordinates: theta^(-2i/d), scaled as in Llama-3.1 or not.

    Scaled: with w = original_sequence_length * f / 2 pi, the turns that frequency f makes in the
    original context, and s = (w - low) / (high - low) clamped to [0, 1],

        f' = (1 - s) * f / factor + s * f

    Returns:
        [d / 2], float32, on the CPU whatever the default device: the last bit of a power differs
        between devices, and a far position multiplies it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
    scaling = config.rope_scaling
    if not scaling.enabled:
        return frequencies
    turns = scaling.original_sequence_length / (2 * math.pi / frequencies)
    band = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = ((turns - scaling.low_frequency_factor) / band).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_tables(frequencies: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the cosines and signed sines of positions 0 to T - 1 for `rotate`.

    Args:
        frequencies: [d / 2], float32; from `inverse_frequencies`.
        length: T, tokens.

    Returns:
        Two tensors [T, 1, d], float32: (cos, cos) and (-sin, sin) side by side.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.to(device)).unsqueeze(1)  # [T, 1, d / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of coordinates of each head by its position's angle (arXiv:2104.09864).

        y_i = x_i cos - x_(i+d/2) sin,    y_(i+d/2) = x_(i+d/2) cos + x_i sin

    Pairing i with i + d/2 is transformers' layout, so exported weights need no permutation.

    Args:
        x: [B, T, H, d], any float dtype.
        cos: [T, 1, d]; see `rotary_tables`. In float32 the product is taken in float32.
        sin: [T, 1, d], signed.

    Returns:
        Same shape and dtype as x.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def document_numbers(tokens: Tensor, *, bos_id: int | None, eos_id: int | None) -> Tensor:
    """Number the document of each token within its sequence, int64 [B, T], not decreasing.

    A document ends with its eos; where documents have none, one begins with each bos. The first
    one of a sequence may have begun before it.

    Args:
        tokens: [B, T], int64.
        bos_id: stands before each document, as in meta.json; None: nothing does.
        eos_id: stands after each document; None: nothing does.
    """
    if eos_id is None:
        assert bos_id is not None
        return tokens.eq(bos_id).cumsum(dim=1)
    ends = tokens.eq(eos_id).long()
    return ends.cumsum(dim=1) - ends


def document_mask(documents: Tensor) -> Tensor:
    """Say which tokens (last dimension) each token attends to: those before it in its document.

    Args:
        documents: [B, T], int64, from `document_numbers`.

    Returns:
        [B, 1, T, T], bool.
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def document_block_mask(documents: Tensor) -> BlockMask:
    """`document_mask` for flex attention, which leaves out blocks that are masked as a whole."""

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    size, length = documents.shape
    return create_block_mask(attends, size, None, length, length, device=documents.device)


class Linear(nn.Linear):
    """x @ W.T without a bias, W cast to x's dtype; NaN until initialised or loaded."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Mark as not initialised; `Llama.init_weights` or a checkpoint fills it."""
        nn.init.constant_(self.weight, math.nan)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A row of [V, D] per token; NaN until initialised or loaded."""

    def reset_parameters(self) -> None:
        """Mark as not initialised; `Llama.init_weights` or a checkpoint fills it."""
        nn.init.constant_(self.weight, math.nan)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, all of a sequence or by a mask."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        kv_dim = config.num_kv_heads * config.head_dim
        self.wq = Linear(config.dim, config.dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D].

        Args:
            x: the residual stream, after its norm.
            cos: from `rotary_tables`, as `sin`.
            mask: of documents, [B, 1, T, T] or in blocks; None: attention to all tokens before.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.wq(x).view(heads), cos, sin).transpose(1, 2)  # [B, H, T, d]
        k = rotate(self.wk(x).view(heads), cos, sin).transpose(1, 2)  # [B, K, T, d]
        v = self.wv(x).view(heads).transpose(1, 2)  # [B, K, T, d]
        if isinstance(mask, BlockMask):
            flex = flex_attention(q, k, v, block_mask=mask, enable_gqa=self.grouped)
            assert isinstance(flex, Tensor)
            mixed = flex
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
            )
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; with checkpointing only x is saved for the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # No dropout anywhere: nothing random to replay.
            recomputed: Tensor = checkpoint(
                self._mix, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False
            )
            return recomputed
        return self._mix(x, cos, sin, mask)

    def _mix(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(OurModel):
    """The language model; the loss is part of `forward`, which FSDP2 hooks.

    Parameters are NaN until `init_weights` or a checkpoint fills them. Sharded, embedding, norm
    and output belong to the root's group: the output matrix is used in the root's own forward.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.known_vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.known_vocab_size)
        self._logit_gradients: LogitGradients = logit_gradients_
        self._frequencies = inverse_frequencies(config)
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._document_ids: dict[str, int | None] | None = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits, or the loss if targets are given.

        Args:
            tokens: [B, T], int64.
            targets: [B, T], int64; the token after each of `tokens`.

        Returns:
            Logits [B, T, V] in the compute dtype; with targets the mean negative log-likelihood
            per token, [], float32, in nats.
        """
        x = self.embedding(tokens).to(self.compute_dtype)  # [B, T, D]
        if self.blocks_compiled:
            mark_batch_dynamic(x)
        cos, sin = self._rotary_tables(tokens.shape[1], tokens.device)
        mask = self._mask(tokens)
        for block in self.layers:
            x = block(x, cos, sin, mask)
        x = self.norm(x)
        makes_logits = self.embedding if self.output is None else self.output
        weight = makes_logits.weight.to(x.dtype)  # [V, D]
        if isinstance(weight, DTensor):
            weight = weight.to_local()  # tensor-parallel ranks have all of it
        if targets is None:
            return F.linear(x, weight)
        return next_token_loss(x.flatten(0, 1), weight, targets.flatten(), self._logit_gradients)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks: one graph for all of them and every batch of two or more sequences.

        A batch of a single sequence, another sequence length and evaluation without gradients
        take one more graph each, and so does the loss's softmax where it is ours.
        Call it before sharding.
        """
        super().compile_blocks(backend)
        self._logit_gradients = compiled_logit_gradients_(backend)

    def separate_documents(self, *, bos_id: int | None, eos_id: int | None) -> None:
        """Let no token attend to another document's, from here on; the ids as in meta.json.

        Positions count on from document to document: attention sees only their differences.
        """
        assert not bos_id is eos_id is None, "nothing stands between documents"
        self._document_ids = {"bos_id": bos_id, "eos_id": eos_id}

    def _mask(self, tokens: Tensor) -> Tensor | BlockMask | None:
        """Return the mask of a batch's documents; None where attention sees them all.

        Flex attention needs a compiler to be fast and heads of FLEX_HEAD_DIM or more, and has no
        backward pass on a CPU.
        """
        if self._document_ids is None:
            return None
        documents = document_numbers(tokens, **self._document_ids)
        wide = self.config.head_dim >= FLEX_HEAD_DIM
        if self.blocks_compiled and tokens.is_cuda and wide:
            return document_block_mask(documents)
        mask = document_mask(documents)
        if self.blocks_compiled:
            mark_batch_dynamic(mask)
        return mask

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tables for T positions, computed once for a length and device.

        Not buffers: those would be cast with the model, and left without values by to_empty.
        """
        key = (length, device)
        if key not in self._tables:
            # Tables made in inference mode could not be used in a training step later.
            with torch.inference_mode(False):
                self._tables[key] = rotary_tables(self._frequencies, length, device)
        return self._tables[key]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter as torchtitan's Llama 3 does.

        Embedding N(0, 1); wq, wk, wv, w1 with std 0.02; wo, w2, w3 of block l = 0, 1, ... with
        0.02 / sqrt(2 (l + 1)), which keeps the residual stream's variance bounded; output with
        D^-0.5 cut at three standard deviations, so that the loss starts near ln V + 1/2; norms
        1. A tied matrix has std 0.02 (ours): with an embedding's its logits would have standard
        deviation sqrt(D), and with an output's a narrow model would start by repeating its input.
        Under muP the deviations follow the width (`model.parametrization`).

        One generator on the parameters' device, parameters in a fixed order: every rank and
        layout draws the same values. Call it before sharding.
        """
        assert type(self.embedding.weight.data) is Tensor, "initialise before sharding"
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        width = self.config.relative_width
        if self.output is None:
            nn.init.trunc_normal_(self.embedding.weight, std=0.02, generator=generator)
        else:
            self.embedding.weight.normal_(generator=generator)
        for weight, std in self._block_matrices():
            std *= initial_factor(Role.MATRIX, width)
            nn.init.trunc_normal_(weight, std=std, generator=generator)
        if self.output is not None:
            std = self.config.dim**-0.5 * initial_factor(Role.OUTPUT, width)
            nn.init.trunc_normal_(
                self.output.weight, std=std, a=-3 * std, b=3 * std, generator=generator
            )
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def _block_matrices(self) -> Iterator[tuple[Tensor, float]]:
        """Iterate over the blocks' matrices and their standard deviations, in order."""
        for index, block in enumerate(self.layers):
            assert isinstance(block, TransformerBlock)
            attention, feed_forward = block.attention, block.feed_forward
            for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1):
                yield linear.weight, 0.02
            for linear in (attention.wo, feed_forward.w2, feed_forward.w3):
                yield linear.weight, 0.02 / math.sqrt(2 * (index + 1))


def mark_batch_dynamic(x: Tensor) -> None:
    """Let a compiled block take other batch sizes than x's without a second graph.

    A batch of one stays out of it: the compiler treats a size of one as a constant.
    """
    if x.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)


def parameter_kind(name: str) -> str:
    """Label a parameter for the noise scale by kind: attention, norm, ... (`per_kind`)."""
    module = name.split(".")[-3] if name.startswith("layers.") else name.split(".")[0]
    return "norm" if name.endswith("norm.weight") else module
