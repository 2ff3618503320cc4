"""Small folders of images for tests."""

from pathlib import Path

import numpy as np

from gns_pretrain.data.images import ImageMeta, write_image_meta, write_split

SHAPE = (8, 6, 3)  # rows, columns, channels
CLASSES = ("cat", "dog", "owl")


def random_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n, 8, 6, 3], and labels of three classes; those of a class look alike."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    noise = generator.integers(0, 128, (count, *SHAPE))
    return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels.astype(np.int64)


def write_images(folder: Path, *, train: int = 20, validation: int = 7) -> Path:
    """A folder as `prepare-images` leaves it."""
    folder.mkdir(parents=True)
    written = {
        split: write_split(folder, split, [random_images(count, seed)], SHAPE)
        for seed, (split, count) in enumerate({"train": train, "validation": validation}.items())
    }
    mean, deviation = written["train"][1].mean_and_deviation()
    height, width, channels = SHAPE
    splits = {split: files for split, (files, _) in written.items()}
    write_image_meta(folder, ImageMeta(height, width, channels, CLASSES, mean, deviation, splits))
    return folder
