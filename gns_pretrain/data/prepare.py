"""Documents to a folder of token shards: resumable, byte-identical however often it is killed.

What reaches the disk, in this order: progress.json with the settings; the tokenizer; shard after
shard, each followed by progress.json; meta.json, which makes the folder valid.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gns_pretrain.cores import available_cores
from gns_pretrain.data.encoding_pool import EncodingPool
from gns_pretrain.data.preparation_plan import (
    SPLITS,
    open_corpora,
    place_tokenizer,
    plan_encoding,
    plan_splits,
)
from gns_pretrain.data.preparation_progress import (
    PreparationProgress,
    SplitProgress,
    refuse_other_settings,
)
from gns_pretrain.data.preparation_settings import PrepareSettings
from gns_pretrain.data.progress_bar import PreparationBar
from gns_pretrain.data.shards import (
    META_FILE,
    PROGRESS_FILE,
    CorpusMeta,
    open_shard,
    read_meta,
    write_meta,
)
from gns_pretrain.data.split_writer import write_split
from gns_pretrain.data.tokenization import TOKENIZER_FILE, vocabulary_size
from gns_pretrain.data.tokens import TokenSplit
from gns_pretrain.errors import InputError
from gns_pretrain.files import folder_lock, remove_temporaries


def prepare(settings: PrepareSettings, *, show_progress: bool = True) -> dict[str, Any]:
    """Write the folder settings.out, or go on writing it where a killed process left it.

    Returns:
        folder, status ("prepared" or "already prepared"), vocab_size, dtype, and by split shards,
        tokens and documents; of this call tokens_written, seconds and tokens_per_second.

    Raises:
        InputError: bad settings or input; settings other than those the folder was begun with.
    """
    folder = Path(settings.out)
    files = settings.find_files()
    identity = settings.identity(files)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out={folder} is a file; name a folder")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, wait=False) as held:
            if not held:
                raise InputError(
                    f"--out={folder} is being prepared by another process; wait for it"
                )
            remove_temporaries(folder)
            if (folder / META_FILE).is_file():
                return _check_finished(folder, identity)
            progress = _begin_or_go_on(folder, identity)
            try:
                return _write_folder(folder, settings, files, progress, show_progress)
            except InputError:
                _leave_nothing_half_begun(folder, progress)
                raise
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}; "
            "once that is mended, the same command goes on"
        ) from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _begin_or_go_on(folder: Path, identity: dict[str, Any]) -> PreparationProgress:
    """The progress of a half-prepared folder, or a new one for an empty folder."""
    if (folder / PROGRESS_FILE).is_file():
        progress = PreparationProgress.load(folder)
        refuse_other_settings(progress.settings, identity, folder)
        return progress
    if any(folder.iterdir()):
        raise InputError(f"--out={folder} holds other files; name a new or an empty folder")
    progress = PreparationProgress(identity, {split: SplitProgress() for split in SPLITS})
    progress.save(folder)
    return progress


def _write_folder(
    folder: Path,
    settings: PrepareSettings,
    files: dict[str, list[Path]],
    progress: PreparationProgress,
    show_progress: bool,
) -> dict[str, Any]:
    """All that is still missing of a folder, from the tokenizer to meta.json."""
    tokens_before = sum(shard.tokens for shard in progress.shards)
    with PreparationBar(hidden=not show_progress) as bar:
        corpora = open_corpora(settings, files)
        tokenizer = place_tokenizer(folder, settings, corpora["train"], progress, bar.say)
        job = plan_encoding(folder, settings, tokenizer)
        dtype = np.dtype(job.dtype)
        for shard in progress.shards:
            open_shard(folder, shard, dtype, verify=False)
        began = time.perf_counter()
        with EncodingPool(job, settings.workers or available_cores()) as pool:
            for split, plan in plan_splits(settings, corpora, dtype).items():
                save = partial(progress.save, folder)
                write_split(folder, plan, progress.splits[split], pool, save, bar.update)
        seconds = time.perf_counter() - began
    meta = CorpusMeta(
        dtype=job.dtype,
        vocab_size=vocabulary_size(tokenizer),
        shards=tuple(progress.splits["train"].shards + progress.splits["validation"].shards),
        bos_id=job.bos_id,
        eos_id=job.eos_id,
        tokenizer=TOKENIZER_FILE,
        tokenizer_sha256=progress.tokenizer_sha256,
        documents={split: progress.splits[split].documents for split in SPLITS},
        settings=progress.settings,
    )
    write_meta(folder, meta)
    (folder / PROGRESS_FILE).unlink()
    written = sum(shard.tokens for shard in meta.shards) - tokens_before
    return _describe(folder, meta, "prepared", tokens_written=written, seconds=seconds)


def _check_finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The row of a finished folder, once its settings and its shards' sizes are found right."""
    meta = read_meta(folder)
    refuse_other_settings(meta.settings, identity, folder)
    for split in SPLITS:
        TokenSplit.open(folder, split)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)  # a kill just after meta.json leaves it
    return _describe(folder, meta, "already prepared", tokens_written=0, seconds=0.0)


def _leave_nothing_half_begun(folder: Path, progress: PreparationProgress) -> None:
    """After bad input: whole training shards are worth keeping; the little before them is not."""
    if not progress.splits["train"].shards:
        for name in (TOKENIZER_FILE, PROGRESS_FILE, *(shard.file for shard in progress.shards)):
            (folder / name).unlink(missing_ok=True)


def _describe(
    folder: Path, meta: CorpusMeta, status: str, *, tokens_written: int, seconds: float
) -> dict[str, Any]:
    splits = {
        split: {
            "shards": len(meta.of_split(split)),
            "tokens": sum(shard.tokens for shard in meta.of_split(split)),
            "documents": meta.documents.get(split),
        }
        for split in ("train", "validation")
    }
    return {
        "folder": str(folder),
        "status": status,
        "vocab_size": meta.vocab_size,
        "dtype": meta.dtype,
        "splits": splits,
        "tokens_written": tokens_written,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens_written / seconds) if seconds else None,
    }
