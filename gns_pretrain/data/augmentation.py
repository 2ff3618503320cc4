"""Random crops and flips of training images, from numbers drawn for each image.

Legend: n images of H rows, W columns and C channels. Pure functions: who draws the numbers decides
what they depend on.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gns_pretrain.fields import Settings, at_least, one_of, within

NUM_DRAWS = 5  # that `augmented` takes of an image
WIDEST = 4 / 3  # ratio of a resized crop's sides, and its inverse; those of the Inception crop


@dataclass
class AugmentationSettings(Settings):
    """How training images are varied; evaluation sees them as they are."""

    section: ClassVar[str] = "data.augmentation"

    # none | pad (with black, then cut out the image's size) | resized (a part, resized)
    crop: Annotated[str, one_of("none", "pad", "resized")] = "pad"
    # pixels on each side, of crop=pad; null: an eighth of the rows, 4 of 32
    padding: Annotated[int | None, at_least(0)] = None
    # least part of the image's area, of crop=resized; SimpleViT's paper has 0.05
    min_area: Annotated[float, within(0, 1, exclusive=True)] = 0.05
    flip: bool = True  # every second image, left to right


def augmented(images: np.ndarray, draws: np.ndarray, settings: AugmentationSettings) -> Tensor:
    """Crop and flip images.

    Args:
        images: [n, H, W, C], uint8.
        draws: [NUM_DRAWS, n], float64 in [0, 1).

    Returns:
        [n, C, H, W], float32, from 0 to 255.
    """
    flips = draws[0] < 0.5 if settings.flip else np.zeros(len(images), dtype=bool)
    if settings.crop == "resized":
        boxes = resized_boxes(draws[1:], settings.min_area)
        return cut_resized(images, boxes, flips)
    padding = images.shape[1] // 8 if settings.padding is None else settings.padding
    reach = padding if settings.crop == "pad" else 0
    down, right = np.floor(draws[1:3] * (2 * reach + 1)).astype(np.int64) - reach
    return as_tensor(shifted(images, down, right, flips))


def as_tensor(images: np.ndarray) -> Tensor:
    """Images as the model takes them: uint8 [n, H, W, C] to float32 [n, C, H, W]."""
    # By numpy, which takes a tenth of torch's time for it.
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32, order="C"))


def shifted(
    images: np.ndarray, down: np.ndarray, right: np.ndarray, flips: np.ndarray
) -> np.ndarray:
    """Cut each image out of its black surroundings, so many pixels off, then flip it or not.

    Args:
        images: [n, H, W, C].
        down: [n], int64; of the window, as `right`; negative: up.
        flips: [n], bool; left to right.
    """
    _, height, width, _ = images.shape
    cut = np.zeros_like(images)
    for target, image, y, x, flip in zip(
        cut, images, down.tolist(), right.tolist(), flips.tolist(), strict=True
    ):
        window = target[:, ::-1] if flip else target
        window[max(0, -y) : max(0, height - y), max(0, -x) : max(0, width - x)] = image[
            max(0, y) : max(0, height + y), max(0, x) : max(0, width + x)
        ]
    return cut


def resized_boxes(draws: np.ndarray, min_area: float) -> np.ndarray:
    """Draw the parts of images that are resized to whole ones.

        area ~ U(min_area, 1),   ln ratio ~ U(-ln 4/3, ln 4/3),
        width = sqrt(area ratio),   height = sqrt(area / ratio)

    Where a side would be longer than the image's it is that long; the Inception crop draws again.

    Args:
        draws: [4, n], float64 in [0, 1).

    Returns:
        [4, n], float64: top, left, height and width, in parts of the image's sides.
    """
    area = min_area + (1.0 - min_area) * draws[0]
    ratio = np.exp((2.0 * draws[1] - 1.0) * math.log(WIDEST))
    height, width = np.sqrt(area / ratio).clip(max=1.0), np.sqrt(area * ratio).clip(max=1.0)
    return np.stack([draws[2] * (1.0 - height), draws[3] * (1.0 - width), height, width])


def cut_resized(images: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Tensor:
    """Resize a part of each image to the whole one's size, bilinearly, then flip it or not.

    Args:
        images: [n, H, W, C], uint8.
        boxes: [4, n], from `resized_boxes`.
        flips: [n], bool.

    Returns:
        [n, C, H, W], float32, from 0 to 255.
    """
    _, height, width, _ = images.shape
    top, left, tall, wide = boxes[:, :, None]  # [n, 1] each
    y = top + tall * (np.arange(height) + 0.5) / height  # [n, H], in parts of the image
    x = left + wide * (np.arange(width) + 0.5) / width
    x = np.where(flips[:, None], x[:, ::-1], x)
    grid = np.empty((len(images), height, width, 2), dtype=np.float32)
    grid[..., 0], grid[..., 1] = 2 * x[:, None, :] - 1, 2 * y[:, :, None] - 1
    return F.grid_sample(
        as_tensor(images), torch.from_numpy(grid), padding_mode="border", align_corners=False
    )
