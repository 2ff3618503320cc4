"""Documents to a folder of token shards: resumable, byte-identical however often it is killed.

What reaches the disk, in this order: progress.json with the settings; the tokenizer; shard after
shard, each followed by progress.json; meta.json, which makes the folder valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer

from gns_pretrain.data.prepare.corpus import (
    Corpus,
    HubDataset,
    LocalFiles,
    is_held_out,
    parse_texts,
)
from gns_pretrain.data.prepare.encoding_pool import EncodingJob, EncodingPool
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.prepare.writer import (
    PreparationProgress,
    SplitPlan,
    SplitProgress,
    refuse_other_settings,
    write_split,
)
from gns_pretrain.data.shards import (
    META_FILE,
    PROGRESS_FILE,
    CorpusMeta,
    TokenShards,
    open_shard,
    read_meta,
    token_dtype,
    write_meta,
)
from gns_pretrain.data.tokenization import (
    BOS_NAMES,
    EOS_NAMES,
    TOKENIZER_FILE,
    read_tokenizer,
    special_token_id,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import folder_lock, remove_temporaries, sha256_of, write_bytes
from gns_pretrain.system.processes import available_cores

# From settings to what each split is made of: corpus, tokenizer, the ids around a document.

SPLITS = ("validation", "train")  # the small one first: what is wrong with it shows early


def open_corpora(settings: PrepareSettings, files: dict[str, list[Path]]) -> dict[str, Corpus]:
    """The corpus of each split; with a held-out fraction both are the training documents."""
    parts = {split: "train" if settings.validation_fraction else split for split in SPLITS}
    if settings.source == "local":
        return {split: LocalFiles(files[part]) for split, part in parts.items()}
    return {
        split: HubDataset(
            settings.dataset, settings.dataset_config, part, [str(path) for path in files[part]]
        )
        for split, part in parts.items()
    }


def place_tokenizer(
    folder: Path,
    settings: PrepareSettings,
    corpus: Corpus,
    progress: PreparationProgress,
    say: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer beside the shards; the first time it is read or trained, and put there."""
    path = folder / TOKENIZER_FILE
    if progress.tokenizer_sha256 is None:
        if settings.train_bpe is None:
            assert settings.tokenizer is not None
            text = read_tokenizer(settings.tokenizer)
        else:
            documents = settings.train_bpe_documents
            say(
                f"training a byte-level BPE of {settings.train_bpe:,} entries "
                f"on the first {documents:,} documents"
            )
            texts = islice(_training_texts(corpus, settings.validation_fraction), documents)
            text = train_bpe(texts, settings.train_bpe).to_str()
        write_bytes(path, text.encode())
        progress.tokenizer_sha256 = sha256_of(path)
        progress.save(folder)
    elif not path.is_file() or sha256_of(path) != progress.tokenizer_sha256:
        raise InputError(
            f"{path} is not the tokenizer that the shards were begun with; "
            "put it back, or name another --out"
        )
    return Tokenizer.from_file(str(path))


def plan_encoding(folder: Path, settings: PrepareSettings, tokenizer: Tokenizer) -> EncodingJob:
    """How the worker processes turn documents into tokens."""
    bos_id = eos_id = None
    if settings.bos:
        bos_id = special_token_id(tokenizer, settings.bos_token, BOS_NAMES, "bos")
    if settings.eos:
        eos_id = special_token_id(tokenizer, settings.eos_token, EOS_NAMES, "eos")
    return EncodingJob(
        tokenizer_file=str(folder / TOKENIZER_FILE),
        dtype=token_dtype(vocabulary_size(tokenizer)).name,
        bos_id=bos_id,
        eos_id=eos_id,
        held_out_fraction=settings.validation_fraction,
    )


def plan_splits(
    settings: PrepareSettings, corpora: dict[str, Corpus], dtype: np.dtype
) -> dict[str, SplitPlan]:
    """What each split is made from, and how it is cut."""
    max_tokens = {"train": settings.max_tokens, "validation": settings.max_validation_tokens}
    return {
        split: SplitPlan(
            name=split,
            corpus=corpora[split],
            held_out=split == "validation",
            dtype=dtype,
            shard_tokens=settings.shard_tokens,
            max_tokens=max_tokens[split],
        )
        for split in SPLITS
    }


def _training_texts(corpus: Corpus, held_out_fraction: float) -> Iterator[str]:
    for batch in corpus.batches(None):
        yield from (text for text in parse_texts(batch) if not is_held_out(text, held_out_fraction))


# The progress bar of a preparation: part of the corpus read, tokens written, tokens per second.


class PreparationBar:
    """One bar a split, on standard error, so that standard output stays for results."""

    def __init__(self, *, hidden: bool = False):
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[millions]:,.1f} M tokens"),
            TextColumn("{task.fields[thousands]:,.0f} k tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=hidden),
            disable=hidden,
        )
        self._tasks: dict[str, tuple[TaskID, float, int]] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, highlight=False)

    def update(self, split: str, tokens: int, fraction: float) -> None:
        """Show tokens written so far, and the fraction (0 to 1) of the split that is done."""
        now = time.perf_counter()
        if split not in self._tasks:
            task = self._bars.add_task(split, total=None, millions=0.0, thousands=0.0)
            self._tasks[split] = (task, now, tokens)
        task, began, tokens_at_start = self._tasks[split]
        rate = (tokens - tokens_at_start) / max(now - began, 1e-9)
        self._bars.update(
            task,
            completed=fraction,
            total=1.0 if fraction else None,  # a stream may not know its length
            millions=tokens / 1e6,
            thousands=rate / 1e3,
        )


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
        TokenShards.open(folder, split)
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
