"""From settings to what each split is made of: corpus, tokenizer, the ids around a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from gns_pretrain.data.corpus import Corpus, LocalFiles, is_held_out, parse_texts
from gns_pretrain.data.encoding_pool import EncodingJob
from gns_pretrain.data.hub import HubDataset
from gns_pretrain.data.preparation_progress import PreparationProgress
from gns_pretrain.data.preparation_settings import PrepareSettings
from gns_pretrain.data.shards import token_dtype
from gns_pretrain.data.split_writer import SplitPlan
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
from gns_pretrain.files import sha256_of, write_bytes

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
