"""The embedded text: token shards made once from the docstrings of installed packages, then cached.

Needs no network and ships no corpus; the same versions of the packages give the same tokens
everywhere.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.data.docstrings import PACKAGES, extract, source_files
from gns_pretrain.data.prepare.corpus import is_held_out
from gns_pretrain.data.shards import META_FILE, CorpusMeta, token_dtype, write_meta, write_shard
from gns_pretrain.data.tokenization import (
    BOS_NAMES,
    EOS_NAMES,
    TOKENIZER_FILE,
    DocumentEncoder,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_home
from gns_pretrain.system.files import (
    folder_lock,
    must_write,
    sha256_of,
    whole_folder,
    write_bytes,
)
from gns_pretrain.system.processes import available_cores
from gns_pretrain.system.terminal import Console

FORMAT = 1  # raise it when the code below makes other tokens from the same packages
MAX_BYTES = 16_000_000  # of text
VALIDATION_FRACTION = 0.02  # of the files
BPE_EVERY = 4  # the BPE is trained on every fourth document: a quarter of the time, 1 % more tokens
MAX_PROCESSES = 16  # more would spend their time on starting
PORTION = 256  # documents, about 2 MB of text: a tokenizer's results take far more memory than ids


def ensure_embedded(cache: Path | None = None, *, vocab_size: int = 4096) -> Path:
    """Return the folder of the embedded text's shards; make it first if it is not there.

    Args:
        cache: as in `ensure_made`.
        vocab_size: entries of the byte-level BPE.

    Raises:
        InputError: the cache cannot be written; the packages' sources are not installed.
    """
    settings = _settings(vocab_size)
    return ensure_made("embedded", "the embedded text", settings, partial(_make, settings), cache)


def ensure_made(
    prefix: str,
    what: str,
    settings: dict[str, Any],
    make: Callable[[Path], str],
    cache: Path | None = None,
) -> Path:
    """Return a folder of the cache that holds a meta.json; make it first if it is not there.

    Several processes may call concurrently: one makes it, the others wait. On a file system without
    locks each makes it, and the first to finish wins.

    Args:
        prefix: of the folder's name.
        what: names it in an error.
        settings: all that decides what it holds.
        make: fills an empty folder, and says what with.
        cache: folder to keep it in; None: $GNS_PRETRAIN_CACHE, else ~/.cache/gns_pretrain.

    Raises:
        InputError: the cache cannot be written.
    """
    if cache is None:
        given = os.environ.get("GNS_PRETRAIN_CACHE") or "~/.cache/gns_pretrain"
        try:
            cache = Path(at_home(given))
        except InputError as error:
            raise InputError(
                f"{what} has no folder: the home directory of {given} is not known; "
                "name one, written out, in the environment variable GNS_PRETRAIN_CACHE"
            ) from error
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{prefix}-{digest[:16]}"
    if (folder / META_FILE).is_file():
        return folder
    hint = "name a folder for it in the environment variable GNS_PRETRAIN_CACHE"
    with must_write(cache, setting=what, hint=hint):
        cache.mkdir(parents=True, exist_ok=True)
        with folder_lock(cache, wait=True):
            if not (folder / META_FILE).is_file():
                _place(folder, make)
    return folder


def _place(folder: Path, make: Callable[[Path], str]) -> None:
    """Make a folder, unless another process is faster."""
    try:
        with whole_folder(folder) as unfinished:
            made = make(unfinished)
            if folder.is_dir() and not (folder / META_FILE).is_file():
                shutil.rmtree(folder)  # its meta.json was removed
    except OSError:
        if not (folder / META_FILE).is_file():
            raise
        return
    Console(stderr=True).print(f"{made} in {folder}")


def _settings(vocab_size: int) -> dict[str, Any]:
    """Name all that decides which tokens come out."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES[1:], "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"source": "embedded", "format": FORMAT, "vocab_size": vocab_size, "versions": versions}


def _make(settings: dict[str, Any], folder: Path) -> str:
    """Fill a folder with the shards and their meta.json."""
    Console(stderr=True).print(
        "making the embedded text from the docstrings of installed packages, once ..."
    )
    documents = gather_documents()
    if not documents:
        raise InputError(
            "no docstrings found: the sources of the installed packages are missing; "
            "set data.path to a folder made with gns-pretrain prepare-data"
        )
    meta = _write_shards(folder, documents, settings)
    write_meta(folder, meta)
    return f"{sum(shard.tokens for shard in meta.shards):,} tokens"


def gather_documents() -> dict[str, str]:
    """Join each file's distinct docstrings to a document, up to MAX_BYTES, by name of the file."""
    files = source_files()
    documents: dict[str, str] = {}
    seen: set[str] = set()
    num_bytes = 0
    found = extract(list(files.values()), min(available_cores(), MAX_PROCESSES))
    for name, docstrings in zip(files, found, strict=True):
        new = [text for text in dict.fromkeys(docstrings) if text not in seen]
        seen.update(new)
        document = "\n\n".join(new)
        num_bytes += len(document.encode())
        if num_bytes > MAX_BYTES:
            break
        if document:
            documents[name] = document
    return documents


def _write_shards(folder: Path, documents: dict[str, str], settings: dict[str, Any]) -> CorpusMeta:
    """Write the tokenizer and one shard per split; a whole file goes to one split or the other."""
    tokenizer = train_bpe(list(documents.values())[::BPE_EVERY], settings["vocab_size"])
    write_bytes(folder / TOKENIZER_FILE, tokenizer.to_str().encode())
    bos_id, eos_id = tokenizer.token_to_id(BOS_NAMES[0]), tokenizer.token_to_id(EOS_NAMES[0])
    dtype = token_dtype(vocabulary_size(tokenizer))
    encoder = DocumentEncoder(tokenizer, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for name, document in documents.items():
        parts["validation" if is_held_out(name, VALIDATION_FRACTION) else "train"].append(document)
    shards = []
    for split, part in parts.items():
        portions = [part[start : start + PORTION] for start in range(0, len(part), PORTION)]
        tokens = np.concatenate([encoder.encode(portion)[0] for portion in portions])
        shards.append(write_shard(folder, split=split, index=0, tokens=tokens))
    return CorpusMeta(
        dtype=dtype.name,
        vocab_size=vocabulary_size(tokenizer),
        shards=tuple(shards),
        bos_id=bos_id,
        eos_id=eos_id,
        tokenizer=TOKENIZER_FILE,
        tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
        documents={split: len(part) for split, part in parts.items()},
        settings=settings,
    )
