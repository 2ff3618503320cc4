"""How fast tokens are read from shards, and how fast shards are made from documents."""

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.harness import Command, Row, paired, this_process, write_random_tokens
from gns_pretrain.data.batches import Batches
from gns_pretrain.data.embedded import gather_documents
from gns_pretrain.data.mixture import Mixture, Source
from gns_pretrain.data.prepare.corpus import LocalFiles, find_files, parse_texts
from gns_pretrain.data.prepare.encoding_pool import EncodingJob, EncodingPool
from gns_pretrain.data.prepare.prepare import SplitPlan, SplitProgress, write_split
from gns_pretrain.data.shards import TokenShards, token_dtype
from gns_pretrain.data.tokenization import train_bpe, vocabulary_size
from gns_pretrain.fields import About, at_least, path_name
from gns_pretrain.system.processes import available_cores

RANDOM_TOKENS = 2**26  # 128 MiB of uint16: more than a processor's caches hold
SHARD_TOKENS = 10_000_000
BATCH_SIZE, MICRO_BATCH_SIZE = 64, 8  # sequences, of reading
DOCUMENTS_PER_CALL = 1000  # of the bare tokenizer


@dataclass
class Data(Command):
    """Reading token shards, and preparing them from documents."""

    data: Annotated[Path | None, path_name(), About("token shards; default: random tokens")] = None
    files: Annotated[
        list[str] | None, path_name(), About("documents; default: the embedded text")
    ] = None
    tokenizer: Annotated[
        str | None, path_name(), About("its file; default: a BPE of the embedded text")
    ] = None
    sequence_length: Annotated[int, at_least(1), About("tokens, for reading")] = 2048
    seconds: Annotated[float, About("how long to read")] = 5.0
    rounds: Annotated[int, at_least(1), About("preparations of each file")] = 3

    def run(self) -> Iterator[Row]:
        """Yield a row for reading and one for preparation."""
        with tempfile.TemporaryDirectory() as folder:
            yield self.reading(Path(folder))
            yield self.preparation(Path(folder))

    def reading(self, scratch: Path) -> Row:
        """Count tokens from training shards to int64 micro-batches on the CPU, on one rank."""
        folder = self.data
        if folder is None:
            folder = scratch / "random"
            write_random_tokens(folder, 32_000, {"train": RANDOM_TOKENS})
        batches = Batches(
            Mixture([Source("shards", 1, TokenShards.open(folder, "train"))]),
            sequence_length=self.sequence_length,
            seed=0,
            device=torch.device("cpu"),
        )
        sizes = {"batch_size": BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE}
        sequences, elapsed, began = 0, 0.0, time.perf_counter()
        while elapsed <= self.seconds:
            for _ in batches.micro_batches(sequences, **sizes):
                pass
            sequences += BATCH_SIZE
            elapsed = time.perf_counter() - began
        batches.close()
        tokens = sequences * self.sequence_length
        return {
            "measured": "reading",
            "data": str(self.data or "random tokens"),
            "sequence_length": self.sequence_length,
            "batch_size": BATCH_SIZE,
            "tokens": tokens,
            "seconds": round(elapsed, 3),
            "tokens_per_second": round(tokens / elapsed),
        }

    def preparation(self, scratch: Path) -> Row:
        """Time documents to shards against the bare tokenizer, alternating, both on all cores.

        The bare tokenizer has its documents in memory and its results are thrown away. Starting the
        worker processes (a second or two) is left out.
        """
        files, tokenizer_file = self.files, self.tokenizer
        if files is None or tokenizer_file is None:
            texts = list(gather_documents().values())
            own_files, own_tokenizer = write_documents(scratch, texts, num_files=4, vocab_size=4096)
            files, tokenizer_file = files or own_files, tokenizer_file or own_tokenizer
        tokenizer = Tokenizer.from_file(tokenizer_file)
        dtype = token_dtype(vocabulary_size(tokenizer))
        job = EncodingJob(tokenizer_file, dtype.name, bos_id=None, eos_id=None)
        paths = find_files(files, "--files")
        rates: dict[str, list[float]] = {"shards": [], "bare": []}  # tokens a second, pair by pair
        with EncodingPool(job, available_cores()) as pool:
            for path in paths:
                corpus = LocalFiles([path])
                texts = [text for batch in corpus.batches(None) for text in parse_texts(batch)[0]]
                steps: dict[str, Callable[[], int]] = {
                    "shards": partial(prepare, corpus, pool, dtype),
                    "bare": partial(encode, texts, tokenizer),
                }
                tokens = {name: step() for name, step in steps.items()}
                timings = paired(steps, self.rounds, this_process(), warm_up=0)
                for name, seconds in timings.seconds.items():
                    rates[name] += [tokens[name] / s for s in seconds]
        ratios = [a / b for a, b in zip(rates["shards"], rates["bare"], strict=True)]
        return {
            "measured": "preparation",
            "files": len(paths),
            "cores": available_cores(),
            "tokens_per_second": round(statistics.median(rates["shards"])),
            "bare_tokens_per_second": round(statistics.median(rates["bare"])),
            "ratio_to_bare": round(statistics.median(ratios), 3),
        }


def write_documents(
    folder: Path, texts: list[str], *, num_files: int, vocab_size: int
) -> tuple[list[str], str]:
    """Write documents in C4's schema, gzipped, and a BPE of the first file's; return the paths."""
    paths = [folder / f"documents.{number}.json.gz" for number in range(num_files)]
    for number, path in enumerate(paths):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::num_files])
        path.write_bytes(gzip.compress("".join(lines).encode()))
    tokenizer = str(folder / "tokenizer.json")
    train_bpe(texts[::num_files], vocab_size).save(tokenizer)
    return [str(path) for path in paths], tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> int:
    """Encode in memory on the tokenizer's own threads; return the number of tokens."""
    tokens = 0
    for start in range(0, len(texts), DOCUMENTS_PER_CALL):
        part = texts[start : start + DOCUMENTS_PER_CALL]
        tokens += sum(map(len, tokenizer.encode_batch_fast(part, add_special_tokens=False)))
    return tokens


def prepare(corpus: LocalFiles, pool: EncodingPool, dtype: np.dtype) -> int:
    """Make shards of some documents, throw them away, and return the number of tokens."""
    plan = SplitPlan("train", corpus, False, dtype, SHARD_TOKENS, max_tokens=None)
    progress = SplitProgress()
    with tempfile.TemporaryDirectory() as out:
        write_split(Path(out), plan, progress, pool, save=lambda: None, report=lambda *_: None)
    return progress.tokens
