"""The embedded images: scikit-learn's handwritten digits, 8 x 8 pixels, made once, then cached.

Needs no network and ships no data: 1,797 images of ten classes come with scikit-learn (of the UCI
repository's test set, by E. Alpaydin and C. Kaynak).
"""

from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.data.embedded import ensure_made
from gns_pretrain.data.images import ImageMeta, write_image_meta, write_split
from gns_pretrain.errors import needs

NAME = "embedded-images"  # begins the folder's
TRAINING = 1_500  # the first ones; the other 297 are the validation split
WHITE = 16  # scikit-learn's brightest value
SETTINGS: dict[str, Any] = {"source": "embedded", "format": 1}  # raised when others come out


def ensure_embedded_images(cache: Path | None = None) -> Path:
    """Return the folder of the embedded images; make it first if it is not there.

    Args:
        cache: as in `embedded.ensure_made`.

    Raises:
        InputError: the cache cannot be written; scikit-learn is not installed.
    """
    return ensure_made(NAME, "the embedded images", SETTINGS, _make, cache)


def _make(folder: Path) -> str:
    with needs("images", "data.path=embedded takes its images from scikit-learn"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    images = np.rint(digits.images * (255 / WHITE)).astype(np.uint8)[..., None]  # [n, 8, 8, 1]
    labels = digits.target.astype(np.int64)
    parts = {"train": slice(0, TRAINING), "validation": slice(TRAINING, None)}
    written = {
        split: write_split(folder, split, [(images[part], labels[part])], images.shape[1:])
        for split, part in parts.items()
    }
    mean, deviation = written["train"][1].mean_and_deviation()
    _, height, width, channels = images.shape
    meta = ImageMeta(
        height=height,
        width=width,
        channels=channels,
        classes=tuple(map(str, digits.target_names)),
        mean=mean,
        deviation=deviation,
        splits={split: files for split, (files, _) in written.items()},
        settings=SETTINGS,
    )
    write_image_meta(folder, meta)
    return f"{len(images):,} images of handwritten digits"
