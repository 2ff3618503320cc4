"""ResNet of basic blocks in its CIFAR form (arXiv:1512.03385): ResNet-18 for small images.

A 3 x 3 convolution of stride 1 stands where ImageNet's ResNet has one of 7 x 7 and a pooling; the
stages are ImageNet's. Legend: n images; C, H, W channels, rows and columns; K classes.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_least
from gns_pretrain.model.batch_norm import BatchNorm
from gns_pretrain.model.classifier import ImageClassifier, ImageShape
from gns_pretrain.model.settings import ModelSettings


@dataclass
class ResNetConfig(ModelSettings):
    """A ResNet; the defaults are ResNet-18's."""

    kind: ClassVar[str] = "resnet"

    width: Annotated[int, at_least(1)] = 64  # channels of the first stage; each doubles them
    # of each stage; each but the first halves rows and columns
    blocks_per_stage: Annotated[list[int], at_least(1)] = field(
        default_factory=lambda: [2, 2, 2, 2]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks_per_stage:
            raise InputError("model.blocks_per_stage=[] has no stage; ResNet-18 has [2, 2, 2, 2]")

    def build(self, image_shape: ImageShape, num_classes: int) -> "ResNet":
        """Build the model, with weights that `init_weights` or a checkpoint replaces."""
        return ResNet(self, image_shape, num_classes)


def convolution(channels: int, out: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, side, stride=stride, padding=side // 2, bias=False)


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 added to the input, which a 1 x 1 one fits where shapes differ."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(channels, out, 3, stride), BatchNorm(out)
        self.conv2, self.norm2 = convolution(out, out, 3), BatchNorm(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(convolution(channels, out, 1, stride), BatchNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] to [n, out, H / stride, W / stride], rounded up."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(ImageClassifier):
    """A convolution, stages of basic blocks, the mean over rows and columns, a head."""

    def __init__(self, config: ResNetConfig, image_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.stem, self.stem_norm = (
            convolution(image_shape[0], config.width, 3),
            BatchNorm(config.width),
        )
        self.layers = nn.ModuleList()
        channels = config.width
        for stage, blocks in enumerate(config.blocks_per_stage):
            out = config.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                self.layers.append(BasicBlock(channels, out, stride))
                channels = out
        self.head = nn.Linear(channels, num_classes)

    def enter(self, images: Tensor) -> Tensor:
        """[n, C, H, W] to [n, width, H, W]."""
        return F.relu(self.stem_norm(self.stem(images)))

    def pool(self, x: Tensor) -> Tensor:
        """[n, C, H, W] to [n, C]."""
        return x.mean((2, 3))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter as torchvision does.

        Convolutions: normal of variance 2 / (out x side^2), which keeps that of the gradient
        through a ReLU. Head: uniform within in^-0.5. BatchNorm: weights 1, biases 0.
        """
        generator = self.generator(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu", generator=generator
                )
            elif isinstance(module, BatchNorm):
                module.reset()
        bound = self.head.in_features**-0.5
        self.head.weight.uniform_(-bound, bound, generator=generator)
        self.head.bias.uniform_(-bound, bound, generator=generator)
