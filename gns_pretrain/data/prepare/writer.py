"""One split of a corpus to whole shards, each followed by a note of where the next one begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.data.prepare.corpus import Corpus, Cursor
from gns_pretrain.data.prepare.encoding_pool import EncodingPool, TokenBatch
from gns_pretrain.data.shards import PROGRESS_FILE, WAY_OUT, ShardMeta, write_shard
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import read_json, write_json

# How far a folder of shards has come: progress.json, which a killed preparation goes on from.
#
# Written after each whole shard; meta.json takes its place when the last one is done.


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


@dataclass(frozen=True)
class SplitPlan:
    """What a split is made from, and how it is cut."""

    name: str
    corpus: Corpus
    held_out: bool  # of the corpus, the held-out documents rather than the others
    dtype: np.dtype
    shard_tokens: int
    max_tokens: int | None  # None: the whole corpus


def write_split(
    folder: Path,
    plan: SplitPlan,
    progress: SplitProgress,
    pool: EncodingPool,
    save: Callable[[], None],
    report: Callable[[str, int, float], None],
) -> None:
    """Write the shards of a split that are still missing.

    Args:
        progress: where the split stands; advanced after each whole shard, then `save` is called.
        report: called with the split, its tokens so far, and the fraction of the work that is done.

    Raises:
        InputError: a file that was read before has changed; the input is bad; the split is empty.
    """
    if progress.done:
        return
    refuse_changed_files(folder, plan, progress)
    limit = sys.maxsize if plan.max_tokens is None else plan.max_tokens
    shard = _ShardBuffer(min(plan.shard_tokens, limit), plan.dtype)
    written, skip, documents = progress.tokens, progress.skip_tokens, progress.documents

    def finish_shard() -> None:
        progress.shards.append(
            write_shard(folder, split=plan.name, index=len(progress.shards), tokens=shard.take())
        )

    # With no token left to write, not even one batch is read.
    batches = plan.corpus.batches(progress.cursor) if written < limit else iter(())
    with closing(pool.encode(batches, held_out=plan.held_out)) as encoded:
        for batch in encoded:
            tokens = batch.tokens[: skip + limit - written]
            while skip < tokens.size:
                taken = shard.add(tokens[skip:])
                skip, written = skip + taken, written + taken
                if shard.is_full:
                    finish_shard()
                    progress.cursor, progress.skip_tokens = batch.cursor, skip
                    progress.documents = documents
                    progress.file_sizes = plan.corpus.sizes_read(batch.cursor)
                    save()
            documents += begun_within(batch, tokens.size)
            skip = 0
            report(plan.name, written, max(batch.fraction, written / limit))
            if written == limit:
                break
    if shard.filled:
        finish_shard()
    if not progress.shards:
        raise InputError(
            f"not one document is left for the split {plan.name}; give more files, "
            "or another --validation-fraction"
        )
    progress.documents, progress.done = documents, True
    save()
    report(plan.name, written, 1.0)


def begun_within(batch: TokenBatch, tokens: int) -> int:
    """Documents of a batch that begin within its first tokens: all, unless the batch is cut."""
    if tokens == batch.tokens.size:
        return batch.starts.size
    return int(np.searchsorted(batch.starts, tokens))


def refuse_changed_files(folder: Path, plan: SplitPlan, progress: SplitProgress) -> None:
    """Refuse to go on if a file that is in the shards already has another size now."""
    if progress.cursor and plan.corpus.sizes_read(progress.cursor) != progress.file_sizes:
        raise InputError(
            f"a file of --{plan.name} that is already in the shards of {folder} has another size "
            "now; put the old one back, or name another --out"
        )


class _ShardBuffer:
    """Collects the tokens of one shard in memory."""

    def __init__(self, capacity: int, dtype: np.dtype):
        self._tokens = np.empty(capacity, dtype)
        self.filled = 0

    @property
    def is_full(self) -> bool:
        return self.filled == self._tokens.size

    def add(self, tokens: np.ndarray) -> int:
        """Take as many of the tokens as fit; returns how many."""
        taken = min(tokens.size, self._tokens.size - self.filled)
        self._tokens[self.filled : self.filled + taken] = tokens[:taken]
        self.filled += taken
        return taken

    def take(self) -> np.ndarray:
        """The tokens collected, valid until the next `add`; the buffer is empty afterwards."""
        tokens = self._tokens[: self.filled]
        self.filled = 0
        return tokens
