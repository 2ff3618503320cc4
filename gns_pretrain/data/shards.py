"""Token shards: a folder with meta.json and one-dimensional .npy files of uint16 or uint32.

    meta.json: dtype, vocab_size, bos_id, eos_id, tokenizer, tokenizer_sha256, and per shard: file,
    split, tokens, sha256. The shards of a split, in meta.json's order, are one long text.
    Sequence i of length L is tokens[i * L : i * L + L + 1]: L inputs and the L targets one further.

Readable with numpy alone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from gns_pretrain.data.arrays import HINT, VERIFY_BELOW_BYTES, open_array
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import (
    named_file,
    parse,
    read_json,
    sha256_of,
    write_json,
    write_whole,
)

META_FILE = "meta.json"
PROGRESS_FILE = "progress.json"  # stands in for meta.json while a folder is being prepared


@dataclass(frozen=True)
class ShardMeta:
    """One .npy file of tokens."""

    file: str  # name inside the folder
    split: str
    tokens: int  # > 0
    sha256: str  # of the whole file


@dataclass(frozen=True)
class CorpusMeta:
    """Content of meta.json."""

    dtype: str  # uint16 or uint32
    vocab_size: int  # every token id is below it
    shards: tuple[ShardMeta, ...]
    bos_id: int | None = None  # stands before each document; null: nothing does
    # Stands after each document; null: nothing does. If it is also bos_id, one stands in between.
    eos_id: int | None = None
    tokenizer: str | None = None  # file inside the folder, or just a name
    tokenizer_sha256: str | None = None  # of that file
    documents: dict[str, int] = field(default_factory=dict)  # by split; the last may be cut off
    # By split: bad records that were left out.
    skipped_records: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # how the folder was prepared

    def of_split(self, split: str) -> tuple[ShardMeta, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def fingerprint(self, split: str) -> str:
        """Identify the tokens of one split, whatever the folder is called."""
        sums = (shard.sha256 for shard in self.of_split(split))
        identity = "\n".join([self.dtype, str(self.vocab_size), *sums])
        return hashlib.sha256(identity.encode()).hexdigest()


def joint_fingerprint(fingerprints: Iterable[str]) -> str:
    """Join those of several splits: a run has training and validation data."""
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrower of the two dtypes that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_meta(folder: Path, meta: CorpusMeta) -> None:
    """Write meta.json: the last file of a folder, it makes the shards valid."""
    write_json(folder / META_FILE, asdict(meta))


def read_meta(folder: Path) -> CorpusMeta:
    """Read and check meta.json; InputError names the file, and what is missing or wrong in it."""
    path = folder / META_FILE
    if not path.is_file():
        if (folder / PROGRESS_FILE).is_file():
            raise InputError(
                f"{folder} is half prepared; finish it with the same prepare-data command"
            )
        raise InputError(
            f"{folder} is not a token-shard folder ({META_FILE} is missing); "
            "make one with gns-pretrain prepare-data"
        )
    again = "prepare the folder again"
    content = read_json(path, hint=HINT)
    if content.get("kind") == "images":
        raise InputError(f"{path} is of images, not of text; name another folder")
    meta = parse(CorpusMeta, content, source=path, hint=again)
    check_shards(meta.shards, path)
    if meta.dtype not in ("uint16", "uint32"):
        raise InputError(f"{path}: dtype={meta.dtype} must be uint16 or uint32; {again}")
    if not 1 <= meta.vocab_size <= np.iinfo(meta.dtype).max + 1:
        raise InputError(
            f"{path}: vocab_size={meta.vocab_size} is not that of {meta.dtype} ids; {again}"
        )
    for name, token_id in (("bos_id", meta.bos_id), ("eos_id", meta.eos_id)):
        if token_id is not None and not 0 <= token_id < meta.vocab_size:
            raise InputError(f"{path}: {name}={token_id} is not below vocab_size; {again}")
    return meta


def check_shards(shards: Iterable[ShardMeta], source: Path) -> None:
    """Check what meta.json or progress.json says; InputError for an empty shard, a foreign file."""
    for shard in shards:
        named_file(shard.file, source)
        if shard.tokens < 1:
            raise InputError(f"{source}: {shard.file} is empty; prepare the folder again")


def write_shard(folder: Path, *, split: str, index: int, tokens: np.ndarray) -> ShardMeta:
    """Write tokens, [n], as one .npy file, whole or not at all, and describe it for meta.json."""
    path = folder / f"{split}_{index:05d}.npy"
    write_whole(path, lambda file: np.lib.format.write_array(file, tokens, allow_pickle=False))
    return ShardMeta(file=path.name, split=split, tokens=tokens.size, sha256=sha256_of(path))


def checked_tokenizer(folder: Path, meta: CorpusMeta) -> Path | None:
    """Return the tokenizer beside the shards, None if there is none; InputError for another one."""
    if meta.tokenizer is None:
        return None
    if meta.tokenizer_sha256 is None and "/" in meta.tokenizer:  # just a name
        return None
    path = named_file(meta.tokenizer, folder / META_FILE)
    back = "put the tokenizer of these shards back"
    if meta.tokenizer_sha256 is None:
        return path if path.is_file() else None
    if not path.is_file():
        raise InputError(f"{path} is missing, though meta.json names it; {back}")
    if sha256_of(path) != meta.tokenizer_sha256:
        raise InputError(f"{path} does not match tokenizer_sha256 in meta.json; {back}")
    return path


def open_shard(folder: Path, shard: ShardMeta, dtype: np.dtype, *, verify: bool) -> np.ndarray:
    """Map one shard into memory: [tokens], dtype as in meta.json, read-only.

    Existence, dtype, length and size are always checked, without reading a page; with `verify` the
    SHA-256 too.
    """
    path = named_file(shard.file, folder / META_FILE)
    sha256 = shard.sha256 if verify else None
    return open_array(path, dtype=dtype, shape=(shard.tokens,), sha256=sha256)


class TokenShards:
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
        self._bos_id, self._eos_id = meta.bos_id, meta.eos_id
        self._files = [shard.file for shard in meta.of_split(split)]
        self._shards = shards
        # Shard k holds the tokens [bounds[k], bounds[k + 1]).
        self._bounds = np.concatenate(
            [[0], np.cumsum([shard.size for shard in shards], dtype=np.int64)]
        )
        self.num_tokens = int(self._bounds[-1])
        self.fingerprint = meta.fingerprint(split)

    @classmethod
    def open(
        cls, folder: Path, split: str, *, verify: bool | None = False, setting: str = "split"
    ) -> Self:
        """Map a split.

        Args:
            verify: compare the shards with their sha256; None: if they are below 256 MiB.
            setting: names the split in an error.

        Raises:
            InputError: naming the split that is not there, or the file that is missing, truncated
                or altered.
        """
        meta = read_meta(folder)
        checked_tokenizer(folder, meta)
        shards = meta.of_split(split)
        if not shards:
            others = ", ".join(sorted({shard.split for shard in meta.shards})) or "no shards"
            raise InputError(f"{setting}={split} is not in {folder / META_FILE}; it has {others}")
        dtype = np.dtype(meta.dtype)
        if verify is None:
            num_bytes = sum(shard.tokens for shard in shards) * dtype.itemsize
            verify = num_bytes < VERIFY_BELOW_BYTES
        opened = [open_shard(folder, shard, dtype, verify=verify) for shard in shards]
        return cls(folder, meta, opened, split)

    @property
    def document_ids(self) -> dict[str, int | None]:
        """bos_id and eos_id from meta.json; InputError if nothing stands around a document."""
        if self._bos_id is self._eos_id is None:
            raise InputError(
                f"data.document_mask=true needs a token around each document, and "
                f"{self.folder / META_FILE} has neither bos_id nor eos_id; prepare the data "
                "without --no-bos or --no-eos"
            )
        return {"bos_id": self._bos_id, "eos_id": self._eos_id}

    def num_sequences(self, sequence_length: int) -> int:
        """Count the whole sequences; the last one needs a target for its last token."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) into a new array of the shards' dtype."""
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
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        last = np.searchsorted(self._bounds, starts + sequence_length, side="right") - 1
        offsets = starts - self._bounds[first]
        columns = (array.tolist() for array in (starts, first, last, offsets))
        for row, start, k, k_last, offset in zip(out, *columns, strict=True):
            if k == k_last:
                row[:] = self._shards[k][offset : offset + sequence_length + 1]
            else:
                row[:] = self.read(start, start + sequence_length + 1)
        if out.size and out.max() >= self.vocab_size:
            n, column = np.argwhere(out >= self.vocab_size)[0]
            position = starts[n] + column
            k = np.searchsorted(self._bounds, position, side="right") - 1
            raise InputError(
                f"{self.folder / self._files[k]} holds the token id {out[n, column]} at position "
                f"{position - self._bounds[k]}, but vocab_size={self.vocab_size} in meta.json; "
                "prepare the folder again"
            )
