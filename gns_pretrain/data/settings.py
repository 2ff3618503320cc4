"""Which tokens a run trains on, and how they are cut into sequences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from gns_pretrain.data.embedded import ensure_embedded
from gns_pretrain.data.shards import TokenShards, read_meta
from gns_pretrain.data.tokenization import MIN_BPE_VOCABULARY
from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, path_name

EMBEDDED = "embedded"


@dataclass(frozen=True)
class TextOrigin:
    """What a run notes about its text, for whoever reads its checkpoints elsewhere or later."""

    folder: str  # of the token shards, absolute
    bos_id: int | None = None  # as in meta.json
    eos_id: int | None = None


@dataclass
class DataSettings(Settings):
    """The text of a run."""

    section: ClassVar[str] = "data"

    # embedded (docstrings of installed packages), or a token-shard folder; given
    path: Annotated[str, path_name()] = "???"
    sequence_length: Annotated[int, at_least(1)] = 256  # tokens of context; 2048 in the paper
    train_split: str = "train"  # split in meta.json
    validation_split: str = "validation"  # split in meta.json
    verify: bool | None = None  # check the shards' sha256 first; null: if they are below 256 MiB
    # folder on a node's own disk to copy shards to; null: none
    stage_to: Annotated[str | None, path_name()] = None
    # Entries of the BPE trained on the embedded text.
    embedded_vocab_size: Annotated[
        int, at_least(MIN_BPE_VOCABULARY, hint="all bytes and two special tokens")
    ] = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_split == self.validation_split:
            raise InputError(
                f"data.validation_split={self.validation_split} is also data.train_split; "
                "name another split"
            )

    def find_folder(self) -> Path:
        """Return the folder of shards; make the embedded text if it is not there."""
        if self.path == EMBEDDED:
            return ensure_embedded(vocab_size=self.embedded_vocab_size)
        return Path(self.path)

    def origin(self) -> TextOrigin:
        """Where the text is, and the ids around its documents; InputError as of `read_meta`."""
        folder = self.find_folder().resolve()
        meta = read_meta(folder)
        return TextOrigin(str(folder), meta.bos_id, meta.eos_id)


def open_splits(settings: DataSettings) -> tuple[TokenShards, TokenShards]:
    """Open the training and the validation split; make the embedded text if it is not there.

    Raises:
        InputError: naming the file that is missing or damaged, or the split that is missing or too
            short for one sequence.
    """
    folder = settings.find_folder()
    if not folder.is_dir():
        raise InputError(
            f"data.path={settings.path} is not a folder; make one with "
            f"gns-pretrain prepare-data, or set data.path={EMBEDDED}"
        )
    opened = []
    for setting in ("train_split", "validation_split"):
        split = getattr(settings, setting)
        tokens = TokenShards.open(folder, split, verify=settings.verify, setting=f"data.{setting}")
        if tokens.num_sequences(settings.sequence_length) < 1:
            raise InputError(
                f"data.sequence_length={settings.sequence_length} must be below the "
                f"{tokens.num_tokens} tokens of the split {split} of {folder}; "
                "use shorter sequences, or more data"
            )
        opened.append(tokens)
    return opened[0], opened[1]
