"""Record batches to token arrays on all cores, in the order of the batches.

Each worker process parses and tokenises whole batches on one thread. That scales better than the
tokenizer's own threads, whose results one Python thread would have to convert.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from gns_pretrain.data.prepare.corpus import Cursor, RecordBatch, is_held_out, parse_texts
from gns_pretrain.data.tokenization import DocumentEncoder
from gns_pretrain.errors import TrainingError


@dataclass(frozen=True)
class EncodingJob:
    """What every worker needs to know."""

    tokenizer_file: str
    dtype: str  # uint16 or uint32
    bos_id: int | None
    eos_id: int | None
    held_out_fraction: float = 0.0  # of the documents, for validation


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one record batch."""

    cursor: Cursor  # of the record batch
    tokens: np.ndarray  # [tokens], uint16 or uint32
    starts: np.ndarray  # [documents], int64: where in `tokens` each begins
    fraction: float  # of the corpus that is read


class EncodingPool:
    """Worker processes for one job (1 worker: this process); any number gives the same tokens."""

    def __init__(self, job: EncodingJob, workers: int):
        self._window = 4 * workers  # batches in flight: enough that no worker waits
        if workers == 1:
            self._encoder = _BatchEncoder(job)
            self._pool = None
            return
        self._pool = ProcessPoolExecutor(
            workers,
            # Not a fork: the tokenizer's threads may be running.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(job,),
        )

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
            yield from (self._encoder(batch, held_out) for batch in batches)
            return
        waiting: deque[Future[TokenBatch]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_encode_in_worker, batch, held_out))
                if len(waiting) > self._window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process was killed, as when memory runs out; the same command, perhaps "
                "with fewer --workers, goes on from the last whole shard"
            ) from error
        finally:  # the caller may want no more
            for future in waiting:
                future.cancel()


class _BatchEncoder:
    def __init__(self, job: EncodingJob):
        self._fraction = job.held_out_fraction
        self._encoder = DocumentEncoder(
            Tokenizer.from_file(job.tokenizer_file),
            dtype=np.dtype(job.dtype),
            bos_id=job.bos_id,
            eos_id=job.eos_id,
        )

    def __call__(self, batch: RecordBatch, held_out: bool) -> TokenBatch:
        texts = parse_texts(batch)
        if self._fraction:
            texts = [text for text in texts if is_held_out(text, self._fraction) == held_out]
        return TokenBatch(batch.cursor, *self._encoder.encode(texts), batch.fraction)


def _start_worker(job: EncodingJob) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    global _worker_encoder
    _worker_encoder = _BatchEncoder(job)


def _die_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: RecordBatch, held_out: bool) -> TokenBatch:
    return _worker_encoder(batch, held_out)


_worker_encoder: _BatchEncoder
