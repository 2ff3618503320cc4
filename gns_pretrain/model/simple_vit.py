"""SimpleViT (arXiv:2205.01580): a vision transformer with fixed positions and a mean over patches.

Legend: n images; C, H, W their channels, rows and columns; P the side of a patch; T = H W / P^2
patches; D model width; h heads; F feed-forward width; K classes.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_least
from gns_pretrain.model.classifier import ImageClassifier, ImageShape
from gns_pretrain.model.settings import ModelSettings, check_heads

Count = Annotated[int, at_least(1)]
NORM_EPS = 1e-6  # added to the variance; that of the paper's code
TEMPERATURE = 10_000.0  # base of the positions' frequencies


@dataclass
class SimpleViTConfig(ModelSettings):
    """A SimpleViT; the paper's S/16 has patches of 16, width 384, 12 layers, 6 heads, 1536."""

    kind: ClassVar[str] = "simple_vit"

    # pixels; side of a patch; null: a quarter of the image's rows
    patch_size: Annotated[int | None, at_least(1)]
    dim: Count  # width of the residual stream
    num_layers: Count  # transformer blocks
    num_heads: Count
    ffn_dim: Count  # hidden width of the feed-forward network

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.dim, self.num_heads)
        if self.dim % 4:
            raise InputError(
                f"model.dim={self.dim} is not a multiple of 4, which the sines and cosines of "
                "two coordinates take; use one"
            )

    def build(self, image_shape: ImageShape, num_classes: int) -> "SimpleViT":
        """Build the model, with weights that `init_weights` or a checkpoint replaces.

        Raises:
            InputError: patches do not divide the image.
        """
        _, rows, columns = image_shape
        patch = self.patch_size or max(rows // 4, 1)
        if rows % patch or columns % patch:
            raise InputError(
                f"model.patch_size={patch} does not divide images of {rows} x {columns} "
                "pixels; use a divisor of both sides"
            )
        return SimpleViT(replace(self, patch_size=patch), image_shape, num_classes)


def positions_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed positions of a grid: sines and cosines of x, then of y.

        w_k = TEMPERATURE^(-k / (D/4 - 1)),   [sin(x w), cos(x w), sin(y w), cos(y w)]

    Returns:
        [rows * columns, D], float32, row by row.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    omega = TEMPERATURE ** -(torch.arange(dim // 4) / max(dim // 4 - 1, 1))
    angles = [torch.outer(place.flatten().float(), omega) for place in (x, y)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)


class LayerNorm(nn.LayerNorm):
    """Of the last dimension, its weights cast to x's dtype: FSDP2's copies may be bfloat16."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Attention of every patch to all patches, [n, T, D] to [n, T, D]."""

    def __init__(self, config: SimpleViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wq = nn.Linear(config.dim, config.dim)
        self.wk = nn.Linear(config.dim, config.dim)
        self.wv = nn.Linear(config.dim, config.dim)
        self.wo = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [n, h, T, D / h]
            for w in (self.wq, self.wk, self.wv)
        )
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: SimpleViTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = LayerNorm(config.dim)
        self.w1 = nn.Linear(config.dim, config.ffn_dim)
        self.w2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.w2(F.gelu(self.w1(self.feed_forward_norm(x)), approximate="tanh"))


class SimpleViT(ImageClassifier):
    """A convolution over patches, fixed positions, encoder blocks, the mean patch, a head."""

    def __init__(self, config: SimpleViTConfig, image_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        self.config = config
        channels, rows, columns = image_shape
        patch = config.patch_size
        assert patch is not None  # `build` fills it in
        self.patches = nn.Conv2d(channels, config.dim, patch, stride=patch)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, num_classes)
        grid = positions_2d(rows // patch, columns // patch, config.dim)
        self.register_buffer("positions", grid, persistent=False)

    def get_input_embeddings(self) -> nn.Module:
        """What makes an embedding of each patch: it has the role of a token embedding."""
        return self.patches

    def enter(self, images: Tensor) -> Tensor:
        """[n, C, H, W] to [n, T, D]."""
        return self.patches(images).flatten(2).transpose(1, 2) + self.positions

    def pool(self, x: Tensor) -> Tensor:
        """[n, T, D] to [n, D]."""
        return self.norm(x).mean(1)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter as the paper's code does, but for its biases of 1e-6, here 0.

        Blocks: uniform by Glorot, of variance 2 / (in + out). Patches: truncated normal of variance
        1 / in. Head: zero, so that the loss starts at ln K and the first gradient is the head's
        alone. Norms 1.
        """
        generator = self.generator(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
        # A normal cut at two standard deviations has 0.88 of its own.
        std = self.patches.weight[0].numel() ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(
            self.patches.weight, std=std, a=-2 * std, b=2 * std, generator=generator
        )
        self.head.weight.zero_()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
