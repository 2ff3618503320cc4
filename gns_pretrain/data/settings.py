"""Which tokens a run trains on, and how they are cut into sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gns_pretrain.data.embedded import ensure_embedded
from gns_pretrain.data.shards import META_FILE, TokenShards, read_meta
from gns_pretrain.errors import InputError

EMBEDDED = "embedded"
VERIFY_BELOW_BYTES = 2**28  # of shards: hashing them takes about a second


@dataclass
class DataSettings:
    """The text of a run."""

    path: str = "???"  # embedded (docstrings of installed packages), or a folder of shards; given
    sequence_length: int = 256  # tokens the model sees at once; 2048 in the paper
    train_split: str = "train"  # split in meta.json
    validation_split: str = "validation"  # split in meta.json
    verify: bool | None = None  # check the shards' sha256 first; null: if they are below 256 MiB
    stage_to: str | None = None  # folder on a node's own disk to copy shards to; null: none
    embedded_vocab_size: int = 4096  # entries of the BPE trained on the embedded text

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise InputError(f"data.sequence_length={self.sequence_length} must be at least 1")
        if self.train_split == self.validation_split:
            raise InputError(
                f"data.validation_split={self.validation_split} is also data.train_split; "
                "name another split"
            )


def open_splits(settings: DataSettings) -> tuple[TokenShards, TokenShards]:
    """The training and the validation split; the embedded text is made if it is not there.

    Raises:
        InputError: naming the file that is missing or damaged, or the split that is missing or too
            short for one sequence.
    """
    if settings.path == EMBEDDED:
        folder = ensure_embedded(vocab_size=settings.embedded_vocab_size)
    else:
        folder = Path(settings.path)
        if not folder.is_dir():
            raise InputError(
                f"data.path={settings.path} is not a folder; make one with "
                f"scripts/prepare_data.py, or set data.path={EMBEDDED}"
            )
    return (
        _open_split(folder, "data.train_split", settings.train_split, settings),
        _open_split(folder, "data.validation_split", settings.validation_split, settings),
    )


def _open_split(folder: Path, setting: str, split: str, settings: DataSettings) -> TokenShards:
    meta = read_meta(folder)
    shards = meta.of_split(split)
    if not shards:
        others = ", ".join(sorted({shard.split for shard in meta.shards}))
        raise InputError(
            f"{setting}={split} is not in {folder}/{META_FILE}; it has {others or 'no shards'}"
        )
    verify = settings.verify
    if verify is None:
        num_bytes = sum(shard.tokens for shard in shards) * np.dtype(meta.dtype).itemsize
        verify = num_bytes < VERIFY_BELOW_BYTES
    opened = TokenShards.open(folder, split, verify=verify)
    if opened.num_sequences(settings.sequence_length) < 1:
        raise InputError(
            f"data.sequence_length={settings.sequence_length} must be below the "
            f"{opened.num_tokens} tokens of the split {split} of {folder}; "
            "use shorter sequences, or more data"
        )
    return opened
