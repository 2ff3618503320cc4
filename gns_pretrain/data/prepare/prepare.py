"""Documents to a folder of token shards: resumable, byte-identical however often it is killed.

What reaches the disk, in this order: progress.json with the settings; the tokenizer; shard after
shard, each followed by progress.json; meta.json, which makes the folder valid.
"""

import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
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
    TOKENIZER_FILE,
    read_tokenizer,
    special_token_id,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import folder_lock, remove_temporaries, sha256_of, write_bytes
from gns_pretrain.system.processes import available_cores

SPLITS = ("validation", "train")  # the small one first: what is wrong with it shows early


def prepare(settings: PrepareSettings, *, show_progress: bool = True) -> dict[str, Any]:
    """Write the folder settings.out, or resume it where a killed process left it.

    Returns:
        folder, status ("prepared" or "already prepared"), vocab_size, dtype, and by split shards,
        tokens and documents; of this call tokens_written, seconds and tokens_per_second.

    Raises:
        InputError: bad settings or input; settings other than those the folder was begun with.
    """
    folder = Path(settings.out)
    files = settings.find_files()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out={folder} is a file; name a folder")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, wait=False) as locked:
            if not locked:
                raise InputError(
                    f"--out={folder} is being prepared by another process; wait for it"
                )
            remove_temporaries(folder)
            return _prepare_locked(folder, settings, files, show_progress)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}; "
            "once that is fixed, the same command resumes"
        ) from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _prepare_locked(
    folder: Path, settings: PrepareSettings, files: dict[str, list[Path]], show_progress: bool
) -> dict[str, Any]:
    """Check a finished folder, resume a half-prepared one, or begin an empty one."""
    identity = settings.identity(files)
    if (folder / META_FILE).is_file():
        meta = read_meta(folder)
        refuse_other_settings(meta.settings, identity, folder)
        for split in SPLITS:
            TokenShards.open(folder, split)
        (folder / PROGRESS_FILE).unlink(missing_ok=True)  # a kill just after meta.json leaves it
        return _row(folder, meta, "already prepared", tokens_written=0, seconds=0.0)
    if (folder / PROGRESS_FILE).is_file():
        progress = PreparationProgress.load(folder)
        refuse_other_settings(progress.settings, identity, folder)
    elif any(folder.iterdir()):
        raise InputError(f"--out={folder} holds other files; name a new or an empty folder")
    else:
        progress = PreparationProgress(identity, {split: SplitProgress() for split in SPLITS})
        progress.save(folder)
    try:
        return _write_folder(folder, settings, files, progress, show_progress)
    except InputError:
        # Whole training shards are worth keeping; the little before them is not.
        if not progress.splits["train"].shards:
            for name in (TOKENIZER_FILE, PROGRESS_FILE, *(shard.file for shard in progress.shards)):
                (folder / name).unlink(missing_ok=True)
        raise


def _write_folder(
    folder: Path,
    settings: PrepareSettings,
    files: dict[str, list[Path]],
    progress: PreparationProgress,
    show_progress: bool,
) -> dict[str, Any]:
    """Write all that a folder still lacks, from the tokenizer to meta.json."""
    tokens_before = sum(shard.tokens for shard in progress.shards)
    with PreparationBars(hidden=not show_progress) as bars:
        corpora: dict[str, Corpus] = {}
        for split in SPLITS:
            # With a held-out fraction both splits are made of the training documents.
            part = "train" if settings.validation_fraction else split
            if settings.source == "local":
                corpora[split] = LocalFiles(files[part])
            else:
                paths = list(map(str, files[part]))
                corpora[split] = HubDataset(settings.dataset, settings.dataset_config, part, paths)
        tokenizer = _place_tokenizer(folder, settings, corpora["train"], progress, bars.console)
        job = EncodingJob(
            tokenizer_file=str(folder / TOKENIZER_FILE),
            dtype=token_dtype(vocabulary_size(tokenizer)).name,
            bos_id=special_token_id(tokenizer, "bos", settings.bos_token) if settings.bos else None,
            eos_id=special_token_id(tokenizer, "eos", settings.eos_token) if settings.eos else None,
            held_out_fraction=settings.validation_fraction,
        )
        dtype = np.dtype(job.dtype)
        for shard in progress.shards:
            open_shard(folder, shard, dtype, verify=False)
        began = time.perf_counter()
        with EncodingPool(job, settings.workers or available_cores()) as pool:
            for split in SPLITS:
                held_out = split == "validation"
                plan = SplitPlan(
                    name=split,
                    corpus=corpora[split],
                    held_out=held_out,
                    dtype=dtype,
                    shard_tokens=settings.shard_tokens,
                    max_tokens=settings.max_validation_tokens if held_out else settings.max_tokens,
                )
                save = partial(progress.save, folder)
                write_split(folder, plan, progress.splits[split], pool, save, bars.report)
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
    return _row(folder, meta, "prepared", tokens_written=written, seconds=seconds)


def _place_tokenizer(
    folder: Path,
    settings: PrepareSettings,
    corpus: Corpus,
    progress: PreparationProgress,
    console: Console,
) -> Tokenizer:
    """Read or train the tokenizer and put it beside the shards; resumed, check that it is there."""
    path = folder / TOKENIZER_FILE
    if progress.tokenizer_sha256 is None:
        if settings.tokenizer is not None:
            text = read_tokenizer(settings.tokenizer)
        else:
            assert settings.train_bpe is not None
            documents = settings.train_bpe_documents
            console.print(
                f"training a byte-level BPE of {settings.train_bpe:,} entries "
                f"on the first {documents:,} documents",
                highlight=False,
            )
            texts = (text for batch in corpus.batches(None) for text in parse_texts(batch))
            kept = (text for text in texts if not is_held_out(text, settings.validation_fraction))
            text = train_bpe(islice(kept, documents), settings.train_bpe).to_str()
        write_bytes(path, text.encode())
        progress.tokenizer_sha256 = sha256_of(path)
        progress.save(folder)
    elif not path.is_file() or sha256_of(path) != progress.tokenizer_sha256:
        raise InputError(
            f"{path} is not the tokenizer that the shards were begun with; "
            "put it back, or name another --out"
        )
    return Tokenizer.from_file(str(path))


class PreparationBars(Progress):
    """One bar per split, on standard error, so that standard output stays for results."""

    def __init__(self, *, hidden: bool):
        super().__init__(
            *Progress.get_default_columns(),
            TextColumn("{task.fields[written]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True, quiet=hidden),
            disable=hidden,
        )

    def report(self, split: str, tokens: int, fraction: float) -> None:
        """Show tokens written so far, and the fraction (0 to 1) of the split that is done."""
        task = next((task for task in self.tasks if task.description == split), None)
        if task is None:
            # Tokens of a process that was killed took this one no time.
            self.add_task(split, total=None, written="", tokens_before=tokens)
            task = self.tasks[-1]
        rate = (tokens - task.fields["tokens_before"]) / max(task.elapsed or 0.0, 1e-9)
        self.update(
            task.id,
            completed=fraction,
            total=1.0 if fraction else None,  # a stream may not know its length
            written=f"{tokens / 1e6:,.1f} M tokens {rate / 1e3:,.0f} k tokens/s",
        )


def _row(
    folder: Path, meta: CorpusMeta, status: str, *, tokens_written: int, seconds: float
) -> dict[str, Any]:
    splits = {
        split: {
            "shards": len(shards := meta.of_split(split)),
            "tokens": sum(shard.tokens for shard in shards),
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
