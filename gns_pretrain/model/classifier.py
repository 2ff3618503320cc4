"""What models of images have in common: blocks that are sharded one by one, and their dtype.

Legend: n images of C channels, H rows and W columns; K classes; D model width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.model.llama import mark_batch_dynamic
from gns_pretrain.model.settings import OurModel

ImageShape = tuple[int, int, int]  # channels, rows, columns


class ImageClassifier(OurModel, ABC):
    """Images to logits of classes: an entry, `layers`, a head.

    Parameters keep their own dtype (float32 master weights); autocast takes copies in
    `compute_dtype` where it is bfloat16. The head is `head`.
    """

    head: nn.Linear

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits, or the loss if labels are given.

        Args:
            images: [n, C, H, W], float32, normalised.
            labels: [n], int64.

        Returns:
            Logits [n, K], float32 or wider; with labels the mean cross-entropy, [], in nats.
        """
        low = self.compute_dtype == torch.bfloat16
        with torch.autocast(images.device.type, self.compute_dtype, enabled=low):
            x = self.enter(images)
            if self.blocks_compiled:
                mark_batch_dynamic(x)
            for block in self.layers:
                x = block(x)
            logits = self.head(self.pool(x))
        logits = logits.float() if low else logits
        return logits if labels is None else F.cross_entropy(logits, labels)

    @abstractmethod
    def enter(self, images: Tensor) -> Tensor:
        """Images to what the blocks take."""

    @abstractmethod
    def pool(self, x: Tensor) -> Tensor:
        """What the blocks return to one vector an image, [n, D]."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer; the same values on every rank, before sharding."""

    def generator(self, seed: int) -> torch.Generator:
        """A generator of first weights, on their device."""
        assert type(self.head.weight.data) is Tensor, "initialise before sharding"
        return torch.Generator(self.head.weight.device).manual_seed(seed)
