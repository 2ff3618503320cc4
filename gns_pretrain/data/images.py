"""Image folders: meta.json and, for each split, the .npy files of its images and of their labels.

    meta.json: kind (images), height, width, channels, classes (their names), mean and deviation of
    each channel over the training split (pixels from 0 to 1), and per split: images, labels (the
    files), count and their sha256.
    Images are uint8 [count, height, width, channels], labels int64 [count].

Readable with numpy alone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from gns_pretrain.data.arrays import HINT, VERIFY_BELOW_BYTES, open_array
from gns_pretrain.data.augmentation import NUM_DRAWS, AugmentationSettings, as_tensor, augmented
from gns_pretrain.data.order import SequenceOrder, uniforms
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import (
    flush_to_disk,
    named_file,
    parse,
    read_json,
    sha256_of,
    write_json,
)

META_FILE = "meta.json"
KIND = "images"  # what meta.json says of itself


@dataclass(frozen=True)
class SplitMeta:
    """The two files of a split."""

    images: str  # name inside the folder
    labels: str
    count: int  # of images, > 0
    images_sha256: str  # of the whole file
    labels_sha256: str


@dataclass(frozen=True)
class ImageMeta:
    """Content of meta.json."""

    height: int
    width: int
    channels: int
    classes: tuple[str, ...]  # names; a label is an index of them
    mean: tuple[float, ...]  # of each channel
    deviation: tuple[float, ...]
    splits: dict[str, SplitMeta]
    kind: str = KIND
    settings: dict[str, Any] = field(default_factory=dict)  # how the folder was prepared

    def fingerprint(self, split: str) -> str:
        """Identify the images, labels and normalisation of a split, whatever the folder's name."""
        of_split = self.splits[split]
        parts = [of_split.images_sha256, of_split.labels_sha256, *self.mean, *self.deviation]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def write_image_meta(folder: Path, meta: ImageMeta) -> None:
    """Write meta.json: the last file of a folder, it makes the others valid."""
    write_json(folder / META_FILE, asdict(meta))


def write_split(
    folder: Path,
    split: str,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, ...],
) -> tuple[SplitMeta, "PixelSums"]:
    """Write the two files of a split into a folder that is not valid yet.

    Args:
        parts: images, uint8 [n, H, W, C], and labels, int64 [n]; how many come shows at the end.
        shape: (H, W, C), of all images.
    """
    names = [f"{split}_{what}.npy" for what in ("images", "labels")]
    labels: list[np.ndarray] = []
    sums = PixelSums(shape[2])
    with (folder / names[0]).open("xb") as file:
        write_header(file, (0, *shape))
        for images, of_them in parts:
            file.write(images.tobytes())
            sums.add(images)
            labels.append(of_them)
        count = sum(map(len, labels))
        file.seek(0)
        write_header(file, (count, *shape))  # as long as before: numpy leaves room for the count
    np.save(folder / names[1], np.concatenate(labels))
    for name in names:
        flush_to_disk(folder / name)
    return SplitMeta(names[0], names[1], count, *(sha256_of(folder / n) for n in names)), sums


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file of uint8."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class PixelSums:
    """Mean and deviation of each channel, exact: sums of integers."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = np.zeros((2, channels), dtype=np.int64)  # of values and of squares

    def add(self, images: np.ndarray) -> None:
        """Add images, uint8 [n, H, W, C]."""
        # Of each channel how often each of 256 values comes.
        values = np.arange(256, dtype=np.int64)
        counts = [
            np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(images, 3, 0)
        ]
        self.count += counts[0].sum()
        self.sums = self.sums + np.stack([np.stack(counts) @ values**power for power in (1, 2)])

    def mean_and_deviation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """By channel, of pixels from 0 to 1; a channel that never changes has the deviation 1."""
        mean, square = self.sums / self.count
        deviation = np.sqrt((square - mean**2).clip(min=0.0))
        deviation[deviation == 0.0] = 255.0
        return tuple((mean / 255).tolist()), tuple((deviation / 255).tolist())


def read_image_meta(folder: Path) -> ImageMeta:
    """Read and check meta.json; InputError names the file, and what is missing or wrong in it."""
    path, again = folder / META_FILE, "prepare the folder again"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a folder of images ({META_FILE} is missing); "
            "make one with gns-pretrain prepare-images"
        )
    content = read_json(path, hint=HINT)
    if content.get("kind") != KIND:
        raise InputError(f"{path} is not of images, but of text; name another folder")
    meta = parse(ImageMeta, content, source=path, hint=again)
    if min(meta.height, meta.width) < 1 or meta.channels not in (1, 3):
        shape = (meta.height, meta.width, meta.channels)
        raise InputError(f"{path}: {shape} is not the shape of images; {again}")
    if not meta.classes or not len(meta.mean) == len(meta.deviation) == meta.channels:
        raise InputError(f"{path}: classes, mean or deviation are not complete; {again}")
    if min(meta.deviation) <= 0.0:
        raise InputError(f"{path}: deviation={list(meta.deviation)} must be positive; {again}")
    for name, split in meta.splits.items():
        if split.count < 1:
            raise InputError(f"{path}: its split {name} is empty; {again}")
    return meta


class ImageSet:
    """One split, memory-mapped and read-only.

    Attributes:
        image_shape: (C, H, W).
        classes: their names.
        num_images: of the split, or of the part that `subset` takes.
        fingerprint: identifies the images and their normalisation, whatever the folder is called.
    """

    def __init__(
        self, folder: Path, meta: ImageMeta, split: str, images: np.ndarray, labels: np.ndarray
    ):
        self.folder, self.split = folder, split
        self.image_shape = (meta.channels, meta.height, meta.width)
        self.classes = meta.classes
        self.fingerprint = meta.fingerprint(split)
        self._images, self._labels = images, labels
        self._chosen = np.arange(len(labels))
        # (x / 255 - mean) / deviation = scale x + shift, by channel.
        mean, deviation = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (meta.mean, meta.deviation)
        )
        self._scale = (1.0 / (255.0 * deviation)).float()
        self._shift = (-mean / deviation).float()

    @classmethod
    def open(
        cls, folder: Path, split: str, *, verify: bool | None = False, setting: str = "split"
    ) -> Self:
        """Map a split.

        Args:
            verify: compare the files with their sha256; None: if they are below 256 MiB.
            setting: names the split in an error.

        Raises:
            InputError: naming the split that is not there, or the file that is missing, truncated
                or altered, or holds a label that is no class.
        """
        meta = read_image_meta(folder)
        if split not in meta.splits:
            others = ", ".join(sorted(meta.splits)) or "no split"
            raise InputError(f"{setting}={split} is not in {folder / META_FILE}; it has {others}")
        files = meta.splits[split]
        shape = (files.count, meta.height, meta.width, meta.channels)
        if verify is None:
            verify = int(np.prod(shape, dtype=np.int64)) < VERIFY_BELOW_BYTES
        images, labels = (
            open_array(
                named_file(name, folder / META_FILE),
                dtype=np.dtype(dtype),
                shape=shape[:dimensions],
                sha256=sha256 if verify else None,
            )
            for name, sha256, dtype, dimensions in (
                (files.images, files.images_sha256, np.uint8, 4),
                (files.labels, files.labels_sha256, np.int64, 1),
            )
        )
        outside = np.flatnonzero((labels < 0) | (labels >= len(meta.classes)))
        if outside.size:
            raise InputError(
                f"{folder / files.labels} holds the label {labels[outside[0]]} at position "
                f"{outside[0]}, but meta.json has {len(meta.classes)} classes; {HINT}"
            )
        return cls(folder, meta, split, images, labels)

    @property
    def num_images(self) -> int:
        return len(self._chosen)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def subset(self, count: int) -> "ImageSet":
        """Return a part of the images, evenly spaced: files are often sorted by class.

        Args:
            count: at least 1 and at most `num_images`.
        """
        part = object.__new__(ImageSet)
        part.__dict__ |= self.__dict__
        part._chosen = self._chosen[np.arange(count) * self.num_images // count]
        if count < self.num_images:
            parts = f"{self.fingerprint}\n{self.num_images}\n{count}"
            part.fingerprint = hashlib.sha256(parts.encode()).hexdigest()
        return part

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read images, uint8 [n, H, W, C], and labels, int64 [n], into new arrays."""
        chosen = self._chosen[indices]
        return self._images[chosen], self._labels[chosen]

    def normalised(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / deviation, float32 [n, C, H, W], in place; x from 0 to 255."""
        return images.mul_(self._scale).add_(self._shift)

    def read_in_order(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Read images [start, stop) as they are: normalised, with their labels; for evaluation."""
        images, labels = self.read(np.arange(start, stop))
        return self.normalised(as_tensor(images)), torch.from_numpy(labels)


class TrainingImages:
    """The images of a run by position: each epoch all of them in a seeded order, augmented.

    Which image a position has, and how it is cropped and flipped, depends on the seed and the
    position alone: neither on ranks nor on where a run was resumed.
    """

    def __init__(self, images: ImageSet, augmentation: AugmentationSettings, *, seed: int):
        self.images, self.augmentation = images, augmentation
        self.order = SequenceOrder(images.num_images, seed)
        self._seed = seed

    def read(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read the images at positions, int64 of any shape [...], to the CPU.

        Returns:
            Images [..., C, H, W], float32, normalised, and labels [...], int64.
        """
        flat = positions.reshape(-1)
        images, labels = self.images.read(self.order(flat))
        draws = uniforms(self._seed, flat, NUM_DRAWS)
        varied = self.images.normalised(augmented(images, draws, self.augmentation))
        return (
            varied.unflatten(0, positions.shape),
            torch.from_numpy(labels).unflatten(0, positions.shape),
        )
