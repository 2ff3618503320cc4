"""What the settings of every kind of data have in common."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, path_name


@dataclass
class DatasetSettings(Settings):
    """Base of the settings of text and of images."""

    section: ClassVar[str] = "data"

    path: Annotated[str, path_name()] = "???"  # a folder, or what stands for one; given
    train_split: str = "train"  # split in meta.json
    validation_split: str = "validation"  # split in meta.json
    verify: bool | None = None  # check the files' sha256 first; null: if they are below 256 MiB
    # folder on a node's own disk to copy the data to; null: none
    stage_to: Annotated[str | None, path_name()] = None

    def origin(self) -> Any:
        """What a run notes about its data, a dataclass; InputError if its meta.json is damaged."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_split == self.validation_split:
            raise InputError(
                f"data.validation_split={self.validation_split} is also data.train_split; "
                "name another split"
            )
