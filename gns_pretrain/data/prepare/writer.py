"""One split of a corpus to whole shards, each followed by progress.json.

progress.json says which shards are whole and where in the corpus the next one begins: a killed
preparation resumes from it. meta.json takes its place when the last shard is written.
"""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from gns_pretrain.data.prepare.corpus import Corpus, Cursor
from gns_pretrain.data.prepare.encoding_pool import EncodingPool
from gns_pretrain.data.shards import HINT, PROGRESS_FILE, ShardMeta, write_shard
from gns_pretrain.errors import InputError
from gns_pretrain.fields import setting_name
from gns_pretrain.system.files import read_json, write_json


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
        return sum(shard.tokens for shard in self.shards)


@dataclass
class PreparationProgress:
    """Content of progress.json."""

    settings: dict[str, Any]  # `PrepareSettings.identity`
    splits: dict[str, SplitProgress]
    tokenizer_sha256: str | None = None  # None: not in the folder yet

    @property
    def shards(self) -> list[ShardMeta]:
        return [shard for split in self.splits.values() for shard in split.shards]

    def save(self, folder: Path) -> None:
        write_json(folder / PROGRESS_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read progress.json; InputError if it is damaged."""
        path = folder / PROGRESS_FILE
        content = read_json(path, hint=HINT)
        try:
            splits = {name: SplitProgress(**split) for name, split in content["splits"].items()}
            for split in splits.values():
                split.shards = [ShardMeta(**shard) for shard in split.shards]  # type: ignore[arg-type]
            return cls(content["settings"], splits, content["tokenizer_sha256"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); remove {folder} and start again"
            ) from error


def refuse_other_settings(begun: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise an InputError that names the first setting that differs from those of the folder."""
    for name, value in now.items():
        before, setting = begun.get(name), setting_name("--", name)
        if before == value:
            continue
        difference = f"{setting}={value}, but {folder} was begun with {before}"
        if isinstance(value, list) and isinstance(before, list):
            difference = (
                f"{setting} names {len(value)} files, but {folder} was begun with {len(before)} "
                "or with other names"
            )
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
    if progress.cursor and plan.corpus.sizes_read(progress.cursor) != progress.file_sizes:
        raise InputError(
            f"a file of --{plan.name} that is already in the shards of {folder} has another size "
            "now; put the old one back, or name another --out"
        )
    limit = sys.maxsize if plan.max_tokens is None else plan.max_tokens
    written, skip, documents = progress.tokens, progress.skip_tokens, progress.documents
    buffer = np.empty(min(plan.shard_tokens, limit), plan.dtype)  # of the shard being filled
    filled = 0

    def finish_shard() -> None:
        index = len(progress.shards)
        shard = write_shard(folder, split=plan.name, index=index, tokens=buffer[:filled])
        progress.shards.append(shard)

    # With no token left to write, not even one batch is read.
    batches = plan.corpus.batches(progress.cursor) if written < limit else iter(())
    with closing(pool.encode(batches, held_out=plan.held_out)) as encoded:
        for batch in encoded:
            tokens = batch.tokens[: skip + limit - written]
            while skip < tokens.size:
                taken = min(tokens.size - skip, buffer.size - filled)
                buffer[filled : filled + taken] = tokens[skip : skip + taken]
                skip, written, filled = skip + taken, written + taken, filled + taken
                if filled == buffer.size:
                    finish_shard()
                    filled = 0
                    progress.cursor, progress.skip_tokens = batch.cursor, skip
                    progress.documents = documents
                    progress.file_sizes = plan.corpus.sizes_read(batch.cursor)
                    save()
            # A document counts if it begins within the tokens: all do, unless the batch is cut.
            is_cut = tokens.size < batch.tokens.size
            documents += (
                int(np.searchsorted(batch.starts, tokens.size)) if is_cut else len(batch.starts)
            )
            skip = 0
            report(plan.name, written, max(batch.fraction, written / limit))
            if written == limit:
                break
    if filled:
        finish_shard()
    if not progress.shards:
        raise InputError(
            f"not one document is left for the split {plan.name}; give more files, "
            "or another --validation-fraction"
        )
    progress.documents, progress.done = documents, True
    save()
    report(plan.name, written, 1.0)
