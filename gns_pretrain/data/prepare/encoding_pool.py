"""Record batches to token arrays on all cores, in the order of the batches.

Each worker process parses and tokenizes whole batches on one thread. That scales better than the
tokenizer's own threads, whose results one Python thread would have to convert.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from gns_pretrain.data.prepare.corpus import Cursor, RecordBatch, is_held_out, parse_texts
from gns_pretrain.data.tokenization import DocumentEncoder
from gns_pretrain.errors import TrainingError


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one record batch."""

    cursor: Cursor  # of the record batch
    tokens: np.ndarray  # [tokens], uint16 or uint32
    starts: np.ndarray  # [documents], int64: where in `tokens` each begins
    fraction: float  # of the corpus that is read
    skipped: int  # records without a text


@dataclass(frozen=True)
class EncodingJob:
    """How documents become tokens; the same in every worker."""

    tokenizer_file: str
    dtype: str  # uint16 or uint32
    bos_id: int | None
    eos_id: int | None
    held_out_fraction: float = 0.0  # of the documents, for validation
    skip_bad: bool = False  # leave out records without a text


@cache  # the tokenizer is loaded once per process
def _encoder(job: EncodingJob) -> DocumentEncoder:
    tokenizer = Tokenizer.from_file(job.tokenizer_file)
    return DocumentEncoder(
        tokenizer, dtype=np.dtype(job.dtype), bos_id=job.bos_id, eos_id=job.eos_id
    )


def _encode(job: EncodingJob, batch: RecordBatch, held_out: bool) -> TokenBatch:
    """Encode the held-out documents of a batch, or the others."""
    texts, skipped = parse_texts(batch, skip_bad=job.skip_bad)
    if job.held_out_fraction:
        texts = [text for text in texts if is_held_out(text, job.held_out_fraction) == held_out]
        if held_out:  # both splits read the corpus, and a bad record counts for the other one
            skipped = 0
    return TokenBatch(batch.cursor, *_encoder(job).encode(texts), batch.fraction, skipped)


class EncodingPool:
    """Worker processes for one job (1 worker: this process); any number gives the same tokens."""

    def __init__(self, job: EncodingJob, workers: int):
        _encoder.cache_clear()  # an earlier pool of this process may have read another file
        self._job = job
        self._window = 4 * workers  # batches in flight: enough that no worker waits
        self._pool = None
        if workers > 1:
            # Not a fork: the tokenizer's threads may be running.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, batches: Iterator[RecordBatch], *, held_out: bool) -> Generator[TokenBatch]:
        """Encode batches, in their order.

        Args:
            held_out: keep the documents held out for validation, rather than the others.

        Raises:
            InputError: of the first record, in order, that holds no text.
            TrainingError: a worker was killed.
        """
        if self._pool is None:
            yield from (_encode(self._job, batch, held_out) for batch in batches)
            return
        waiting: deque[Future[TokenBatch]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_encode, self._job, batch, held_out))
                if len(waiting) > self._window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process was killed, as when memory runs out; the same command, perhaps "
                "with fewer --workers, resumes from the last whole shard"
            ) from error
        finally:  # the caller may want no more
            for future in waiting:
                future.cancel()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End a worker whose parent was killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
