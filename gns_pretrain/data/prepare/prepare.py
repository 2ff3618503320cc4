"""Documents to a folder of token shards: resumable, byte-identical however often it is killed.

What reaches the disk, in this order: progress.json with the settings; the tokenizer; shard after
shard, each followed by progress.json; meta.json, which makes the folder valid. progress.json says
which shards are whole and where in the corpus the next one begins.
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from gns_pretrain.data.arrays import HINT
from gns_pretrain.data.prepare.corpus import (
    Corpus,
    Cursor,
    HubDataset,
    LocalFiles,
    is_held_out,
    parse_texts,
)
from gns_pretrain.data.prepare.encoding_pool import EncodingJob, EncodingPool
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.shards import (
    META_FILE,
    PROGRESS_FILE,
    CorpusMeta,
    ShardMeta,
    TokenShards,
    check_shards,
    open_shard,
    read_meta,
    token_dtype,
    write_meta,
    write_shard,
)
from gns_pretrain.data.tokenization import (
    TOKENIZER_FILE,
    read_tokenizer,
    special_token_id,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from gns_pretrain.fields import setting_name
from gns_pretrain.system.files import (
    folder_lock,
    must_write,
    parse,
    read_json,
    remove_temporaries,
    sha256_of,
    write_bytes,
    write_json,
)
from gns_pretrain.system.processes import available_cores
from gns_pretrain.system.terminal import Console

SPLITS = ("validation", "train")  # the small one first: what is wrong with it shows early
SEPARATORS = 1  # tokens between two documents where bos and eos are one id; once it was 2


@dataclass
class SplitProgress:
    """Whole shards of one split, and where in the corpus the next one begins."""

    shards: list[ShardMeta] = field(default_factory=list)
    cursor: Cursor | None = None  # record batch that the last whole shard ends in
    skip_tokens: int = 0  # tokens of that batch which are in whole shards
    documents: int = 0  # before that batch; over the whole split once done
    skipped: int = 0  # bad records, counted like documents
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
    separators: int = 2  # SEPARATORS when the folder was begun

    @property
    def shards(self) -> list[ShardMeta]:
        return [shard for split in self.splits.values() for shard in split.shards]

    def save(self, folder: Path) -> None:
        write_json(folder / PROGRESS_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read progress.json; InputError if it is damaged."""
        path = folder / PROGRESS_FILE
        hint = f"remove {folder} and start again"
        progress = parse(cls, read_json(path, hint=HINT), source=path, hint=hint)
        if progress.splits.keys() != set(SPLITS):
            raise InputError(f"{path} is damaged (splits={list(progress.splits)}); {hint}")
        check_shards(progress.shards, path)
        return progress


def refuse_other_settings(begun: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise an InputError that names the first setting that differs from those of the folder."""
    for name, value in now.items():
        # A folder may be older than a setting, which then had its default.
        before = begun.get(name, getattr(PrepareSettings, name, None))
        setting = setting_name("--", name)
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
    written, skip = progress.tokens, progress.skip_tokens
    documents, skipped = progress.documents, progress.skipped
    buffer = np.empty(min(plan.shard_tokens, limit), plan.dtype)  # of the shard being filled
    filled = 0

    def finish_shard() -> None:
        index = len(progress.shards)
        shard = write_shard(folder, split=plan.name, index=index, tokens=buffer[:filled])
        progress.shards.append(shard)

    # With no token left to write, the batch of the last one is still to be counted.
    batches = plan.corpus.batches(progress.cursor)
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
                    progress.documents, progress.skipped = documents, skipped
                    progress.file_sizes = plan.corpus.sizes_read(batch.cursor)
                    save()
            # A document counts if it begins within the tokens: all do, unless the batch is cut.
            is_cut = tokens.size < batch.tokens.size
            documents += (
                int(np.searchsorted(batch.starts, tokens.size)) if is_cut else len(batch.starts)
            )
            skipped += batch.skipped
            skip = 0
            report(plan.name, written, max(batch.fraction, written / limit))
            if written == limit:
                break
    if filled:
        finish_shard()
    if not progress.shards:
        raise InputError(
            f"not one document is left for the split {plan.name}; give more files, "
            "another --validation-fraction, or --txt-documents blank-line where a .txt file "
            "holds several"
        )
    progress.documents, progress.skipped, progress.done = documents, skipped, True
    save()
    report(plan.name, written, 1.0)


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
        hint = "once that is fixed, the same command resumes"
        with must_write(folder, setting="--out", hint=hint):
            folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(folder, wait=False) as locked:
                if not locked:
                    raise InputError(
                        f"--out={folder} is being prepared by another process; wait for it"
                    )
                remove_temporaries(folder)
                return _prepare_locked(folder, settings, files, show_progress)
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
        begun = {split: SplitProgress() for split in SPLITS}
        progress = PreparationProgress(identity, begun, separators=SEPARATORS)
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
                corpora[split] = LocalFiles(
                    files[part],
                    text_key=settings.text_key,
                    by_paragraph=settings.txt_documents == "blank-line",
                )
            else:
                paths = list(map(str, files[part]))
                corpora[split] = HubDataset(
                    settings.dataset,
                    settings.dataset_config,
                    part,
                    paths,
                    text_key=settings.text_key,
                )
        tokenizer = _place_tokenizer(
            folder, settings, corpora["train"], progress, bars.console.print
        )
        job = EncodingJob(
            tokenizer_file=str(folder / TOKENIZER_FILE),
            dtype=token_dtype(vocabulary_size(tokenizer)).name,
            bos_id=special_token_id(tokenizer, "bos", settings.bos_token) if settings.bos else None,
            eos_id=special_token_id(tokenizer, "eos", settings.eos_token) if settings.eos else None,
            held_out_fraction=settings.validation_fraction,
            skip_bad=settings.skip_bad_records,
        )
        if job.bos_id is not None and job.bos_id == job.eos_id:
            if progress.separators != SEPARATORS:
                raise InputError(
                    f"{folder} was begun by a version that put two tokens between documents where "
                    "bos and eos are the same, and this one puts one; name another --out"
                )
            name = tokenizer.id_to_token(job.bos_id)
            bars.console.print(f"{name} is bos and eos: one of it stands between two documents")
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
        skipped_records={split: progress.splits[split].skipped for split in SPLITS},
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
    log: Callable[[str], object],
) -> Tokenizer:
    """Read or train the tokenizer and put it beside the shards; resumed, check that it is there."""
    path = folder / TOKENIZER_FILE
    if progress.tokenizer_sha256 is None:
        if settings.tokenizer is not None:
            text = read_tokenizer(settings.tokenizer)
        else:
            assert settings.train_bpe is not None
            documents = settings.train_bpe_documents
            log(
                f"training a byte-level BPE of {settings.train_bpe:,} entries "
                f"on the first {documents:,} documents"
            )
            texts = (
                text
                for batch in corpus.batches(None)
                for text in parse_texts(batch, skip_bad=settings.skip_bad_records)[0]
                if not is_held_out(text, settings.validation_fraction)
            )
            text = train_bpe(islice(texts, documents), settings.train_bpe).to_str()
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
            "documents": meta.documents.get(split, 0),
            "skipped_records": meta.skipped_records.get(split, 0),
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
