"""Which images a run trains on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from gns_pretrain.data.augmentation import AugmentationSettings
from gns_pretrain.data.dataset import DatasetSettings
from gns_pretrain.data.embedded_images import ensure_embedded_images
from gns_pretrain.data.images import ImageSet, read_image_meta
from gns_pretrain.data.settings import EMBEDDED
from gns_pretrain.fields import at_least, path_name


@dataclass(frozen=True)
class ImageOrigin:
    """What a run notes about its images."""

    folder: str  # absolute
    num_images: int  # that it trains on


@dataclass
class ImageDataSettings(DatasetSettings):
    """The images of a run."""

    # embedded (scikit-learn's digits), or a folder that gns-pretrain prepare-images wrote; given
    path: Annotated[str, path_name()] = "???"
    # take the embedded images where there is no folder at path, as a run's header says
    or_embedded: bool = False
    # of the training split, evenly spaced, at most; null: all
    num_images: Annotated[int | None, at_least(1)] = None
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)

    @property
    def is_missing(self) -> bool:
        """Whether the embedded images stand for those that path names."""
        return self.or_embedded and self.path != EMBEDDED and not Path(self.path).exists()

    @property
    def found(self) -> str:
        """What a run trains on, for its log."""
        return f"{self.path} is not there, so the embedded digits" if self.is_missing else self.path

    def find_folder(self) -> Path:
        """Return the folder of images; make the embedded ones if they are not there."""
        is_embedded = self.path == EMBEDDED or self.is_missing
        return ensure_embedded_images() if is_embedded else Path(self.path)

    def open_splits(self) -> tuple[ImageSet, ImageSet]:
        """Open the training split, as many images of it as there may be, and the validation split.

        Raises:
            InputError: naming the file that is missing or damaged, or the split that is not there.
        """
        folder = self.find_folder()
        training, validation = (
            ImageSet.open(folder, getattr(self, name), verify=self.verify, setting=f"data.{name}")
            for name in ("train_split", "validation_split")
        )
        return training.subset(self.taken(training.num_images)), validation

    def taken(self, there: int) -> int:
        """Images of a training split of so many that a run takes."""
        return min(self.num_images or there, there)

    def origin(self) -> ImageOrigin:
        """Where the images are, and how many."""
        folder = self.find_folder().resolve()
        there = read_image_meta(folder).splits[self.train_split].count
        return ImageOrigin(str(folder), self.taken(there))
