"""Sequences of tokens from one split of a folder of shards, by memory map."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gns_pretrain.data.shards import META_FILE, CorpusMeta, check_tokenizer, open_shard, read_meta
from gns_pretrain.errors import InputError


class TokenSplit:
    """One split over its shards, memory-mapped and read-only.

    Attributes:
        num_tokens: over all shards.
        vocab_size: from meta.json; ids at or past it are refused where sequences are read.
        fingerprint: identifies the tokens of this split, whatever the folder is called.
    """

    def __init__(self, folder: Path, meta: CorpusMeta, shards: list[np.ndarray], split: str):
        self.folder = folder
        self.split = split
        self.vocab_size = meta.vocab_size
        self._files = [shard.file for shard in meta.of_split(split)]
        self._shards = shards
        # Shard k holds the tokens [bounds[k], bounds[k + 1]).
        self._bounds = np.concatenate(
            [[0], np.cumsum([shard.size for shard in shards], dtype=np.int64)]
        )
        self.num_tokens = int(self._bounds[-1])
        self.fingerprint = meta.fingerprint(split)

    @classmethod
    def open(cls, folder: Path, split: str, *, verify: bool = False) -> TokenSplit:
        """Map a split; InputError names the file that is missing, truncated or altered."""
        meta = read_meta(folder)
        check_tokenizer(folder, meta)
        if not meta.of_split(split):
            others = ", ".join(sorted({shard.split for shard in meta.shards})) or "none"
            raise InputError(
                f"{folder / META_FILE} has no split {split!r} (it has: {others}); name one of these"
            )
        dtype = np.dtype(meta.dtype)
        shards = [open_shard(folder, shard, dtype, verify=verify) for shard in meta.of_split(split)]
        return cls(folder, meta, shards, split)

    def num_sequences(self, sequence_length: int) -> int:
        """Whole sequences in the split: the last one needs a target for its last token."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a new array in the shards' dtype."""
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right") - 1
        pieces = [
            self._shards[k][max(0, start - self._bounds[k]) : stop - self._bounds[k]]
            for k in range(first, last + 1)
        ]
        return np.concatenate(pieces)

    def read_sequences(self, indices: np.ndarray, sequence_length: int, out: np.ndarray) -> None:
        """Fill out, int64 [n, L + 1], with the sequences indices, int64 [n].

        Raises InputError, naming the shard, if a token id is not below vocab_size.
        """
        starts = indices * sequence_length
        shard_of_first = np.searchsorted(self._bounds, starts, side="right") - 1
        shard_of_last = np.searchsorted(self._bounds, starts + sequence_length, side="right") - 1
        offsets = starts - self._bounds[shard_of_first]
        rows = zip(
            out,
            starts.tolist(),
            shard_of_first.tolist(),
            shard_of_last.tolist(),
            offsets.tolist(),
            strict=True,
        )
        for row, start, first, last, offset in rows:
            if first == last:
                row[:] = self._shards[first][offset : offset + sequence_length + 1]
            else:
                row[:] = self.read(start, start + sequence_length + 1)
        if out.size and out.max() >= self.vocab_size:
            self._refuse_ids(indices, sequence_length, out)

    def _refuse_ids(self, indices: np.ndarray, sequence_length: int, out: np.ndarray) -> None:
        row, column = np.argwhere(out >= self.vocab_size)[0]
        position = int(indices[row]) * sequence_length + int(column)
        shard = int(np.searchsorted(self._bounds, position, side="right")) - 1
        offset = position - int(self._bounds[shard])
        raise InputError(
            f"{self.folder / self._files[shard]} holds the token id {out[row, column]} at position "
            f"{offset}, but vocab_size={self.vocab_size} in meta.json; prepare the folder again"
        )
