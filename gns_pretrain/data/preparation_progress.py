"""How far a folder of shards has come: progress.json, which a killed preparation goes on from.

Written after each whole shard; meta.json takes its place when the last one is done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gns_pretrain.data.corpus import Cursor
from gns_pretrain.data.shards import PROGRESS_FILE, WAY_OUT, ShardMeta
from gns_pretrain.errors import InputError
from gns_pretrain.files import read_json, write_json


@dataclass
class SplitProgress:
    """Whole shards of one split, and where in the corpus the next one begins."""

    shards: list[ShardMeta] = field(default_factory=list)
    cursor: Cursor | None = None  # record batch that the last whole shard ends in
    skip_tokens: int = 0  # tokens of that batch which are in whole shards
    documents: int = 0  # before that batch; over the whole split once done
    file_sizes: list[int] = field(default_factory=list)  # bytes of the files wholly before it
    done: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in whole shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass
class PreparationProgress:
    """All that is known about a half-prepared folder."""

    settings: dict[str, Any]
    splits: dict[str, SplitProgress]
    tokenizer_sha256: str | None = None  # None: not in the folder yet

    @property
    def shards(self) -> list[ShardMeta]:
        """Whole shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def save(self, folder: Path) -> None:
        """Write progress.json, whole or not at all."""
        write_json(folder / PROGRESS_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> PreparationProgress:
        """Read progress.json; InputError if it, or a shard it names, is damaged."""
        path = folder / PROGRESS_FILE
        content = read_json(path, way_out=WAY_OUT)
        try:
            splits = {
                name: SplitProgress(
                    **{**split, "shards": [ShardMeta(**shard) for shard in split["shards"]]}
                )
                for name, split in content["splits"].items()
            }
            return cls(content["settings"], splits, content["tokenizer_sha256"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); remove {folder} and start again"
            ) from error


def refuse_other_settings(begun: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """InputError naming the first setting that differs from those the folder was begun with."""
    for name, value in now.items():
        before = begun.get(name)
        if before == value:
            continue
        setting = "--" + name.replace("_", "-")
        if isinstance(value, list) and isinstance(before, list):
            difference = (
                f"{setting} names {len(value)} files, but {folder} was begun with {len(before)} "
                "or with other names"
            )
        else:
            difference = f"{setting}={value}, but {folder} was begun with {before}"
        raise InputError(f"{difference}; give the same settings, or another --out")
