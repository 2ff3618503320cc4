"""How fast tokens are read from shards, and how fast shards are made from documents."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from gns_pretrain.data.batches import Batches
from gns_pretrain.data.embedded import gather_documents
from gns_pretrain.data.prepare.corpus import LocalFiles, find_files, parse_texts
from gns_pretrain.data.prepare.encoding_pool import EncodingJob, EncodingPool
from gns_pretrain.data.prepare.writer import SplitPlan, SplitProgress, write_split
from gns_pretrain.data.shards import CorpusMeta, TokenShards, token_dtype, write_meta, write_shard
from gns_pretrain.data.tokenization import train_bpe, vocabulary_size
from gns_pretrain.system.processes import available_cores

RANDOM_TOKENS = 2**26  # 128 MiB of uint16: more than a processor's caches hold
SHARD_TOKENS = 10_000_000
DOCUMENTS_AT_ONCE = 1000  # that the bare tokenizer is given


def measure_reading(
    folder: Path | None = None,
    *,
    sequence_length: int = 2048,
    batch_size: int = 64,
    micro_batch_size: int = 8,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Tokens per second from training shards to int64 micro-batches on the CPU, on one rank.

    Args:
        folder: token shards; None: random tokens, uint16, in a temporary folder.
        batch_size, micro_batch_size: sequences in a step and in a micro-batch.
        seconds: how long to read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        split = TokenShards.open(folder or _write_random_shards(Path(temporary)), "train")
        device = torch.device("cpu")
        batches = Batches(split, sequence_length=sequence_length, seed=0, device=device)
        began = time.perf_counter()
        for step in count(1):
            for _ in batches.micro_batches(
                (step - 1) * batch_size,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
            ):
                pass
            elapsed = time.perf_counter() - began
            if elapsed > seconds:
                break
        batches.close()
    tokens = step * batch_size * sequence_length
    return {
        "measured": "reading",
        "data": str(folder or "random tokens"),
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "tokens": tokens,
        "seconds": round(elapsed, 3),
        "tokens_per_second": round(tokens / elapsed),
    }


def measure_preparation(
    files: list[str] | None = None, tokenizer: str | None = None, *, rounds: int = 3
) -> dict[str, Any]:
    """Tokens per second from documents to shards, against the bare tokenizer, both on all cores.

    The bare tokenizer has its documents in memory, and its results are thrown away. Both take
    turns, file by file; the ratio is the median over these pairs, so that a busy machine slows
    both. Starting the worker processes (a second or two) is left out.

    Args:
        files: documents in C4's schema; None: the embedded text.
        tokenizer: a tokenizer.json; None: a BPE trained on the embedded text.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if files is None or tokenizer is None:
            own_files, own_tokenizer = _write_embedded_documents(folder)
            files, tokenizer = files or own_files, tokenizer or own_tokenizer
        bare = Tokenizer.from_file(tokenizer)
        dtype = token_dtype(vocabulary_size(bare))
        job = EncodingJob(tokenizer, dtype.name, bos_id=0, eos_id=0)
        pairs = []
        with EncodingPool(job, available_cores()) as pool:
            paths = find_files(files, "--files")
            _preparation_rate(paths[0], pool, dtype, folder / "warm_up")
            for number in range(rounds):
                for path in paths:
                    bare_rate = _bare_rate(path, bare)
                    rate = _preparation_rate(path, pool, dtype, folder / f"{path.name}_{number}")
                    pairs.append((bare_rate, rate))
    bare_rates, rates = zip(*pairs, strict=True)
    return {
        "measured": "preparation",
        "files": len(paths),
        "cores": available_cores(),
        "tokens_per_second": round(statistics.median(rates)),
        "bare_tokens_per_second": round(statistics.median(bare_rates)),
        "ratio_to_bare": round(statistics.median(ours / theirs for theirs, ours in pairs), 3),
    }


def _write_random_shards(folder: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 32_000, RANDOM_TOKENS, dtype=np.uint16)
    shards = tuple(
        write_shard(folder, split="train", index=index, tokens=part)
        for index, part in enumerate(np.array_split(tokens, 4))
    )
    write_meta(folder, CorpusMeta(dtype="uint16", vocab_size=32_000, shards=shards))
    return folder


def _write_embedded_documents(folder: Path) -> tuple[list[str], str]:
    """(files, tokenizer) of the embedded text as gzipped documents."""
    texts = list(gather_documents().values())
    paths = [folder / f"documents.{number}.json.gz" for number in range(4)]
    for number, path in enumerate(paths):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number :: len(paths)]]
        path.write_bytes(gzip.compress("".join(lines).encode()))
    train_bpe(texts[:: len(paths)], 4096).save(str(folder / "tokenizer.json"))
    return [str(path) for path in paths], str(folder / "tokenizer.json")


def _bare_rate(path: Path, tokenizer: Tokenizer) -> float:
    """Tokens per second of the tokenizer's own threads."""
    texts = [text for batch in LocalFiles([path]).batches(None) for text in parse_texts(batch)]
    seconds, tokens = 0.0, 0
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        part = texts[start : start + DOCUMENTS_AT_ONCE]
        began = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        seconds += time.perf_counter() - began
        tokens += sum(map(len, encodings))
    return tokens / seconds


def _preparation_rate(path: Path, pool: EncodingPool, dtype: np.dtype, out: Path) -> float:
    """Tokens per second from a file to shards on disk."""
    out.mkdir()
    plan = SplitPlan(
        name="train",
        corpus=LocalFiles([path]),
        held_out=False,
        dtype=dtype,
        shard_tokens=SHARD_TOKENS,
        max_tokens=None,
    )
    progress = SplitProgress()
    began = time.perf_counter()
    write_split(out, plan, progress, pool, save=lambda: None, report=lambda *_: None)
    return progress.tokens / (time.perf_counter() - began)
