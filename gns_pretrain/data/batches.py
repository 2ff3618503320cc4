"""From a position in the run to the micro-batches of one rank, read ahead by a background thread.

The position (cursor) is one integer: the number of sequences consumed so far. A step consumes the
sequences at positions [cursor, cursor + B) of the run's order; its micro-batch j is the j-th
contiguous block of them, whichever rank computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.tokens import TokenSplit


class _Request(NamedTuple):
    """One rank's part of one step; sizes in sequences."""

    cursor: int
    batch_size: int
    micro_batch_size: int
    rank: int
    num_ranks: int

    def positions(self) -> np.ndarray:
        """Positions in the run's order, int64 [micro-batches of this rank, micro_batch_size]."""
        step = np.arange(self.cursor, self.cursor + self.batch_size, dtype=np.int64)
        return step.reshape(-1, self.micro_batch_size)[self.rank :: self.num_ranks]

    def next_step(self) -> _Request:
        return self._replace(cursor=self.cursor + self.batch_size)


class Batches:
    """The training sequences of a split, in a seeded order, epoch after epoch.

    Holds no position of its own: the caller passes the cursor, so that a checkpoint is one integer.
    While a step is computed, a thread reads the next one, guessing that the sizes stay the same; a
    wrong guess is thrown away.
    """

    def __init__(self, split: TokenSplit, *, sequence_length: int, seed: int, device: torch.device):
        self._split = split
        self._sequence_length = sequence_length
        self._num_sequences = split.num_sequences(sequence_length)
        self._order = SequenceOrder(self._num_sequences, seed)
        self._device = device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[_Request, Future[Tensor]] | None = None

    def micro_batches(
        self, cursor: int, *, batch_size: int, micro_batch_size: int, rank: int, num_ranks: int
    ) -> Iterator[Tensor]:
        """This rank's micro-batches of a step, each int64 [micro_batch_size, L + 1] on the device.

        Micro-batch j of the step goes to rank j % num_ranks. A failed read surfaces here.

        Args:
            cursor: sequences consumed before this step, over all ranks.
            batch_size: sequences of the step over all ranks, a multiple of micro_batch_size.
        """
        assert batch_size % micro_batch_size == 0, (batch_size, micro_batch_size)
        request = _Request(cursor, batch_size, micro_batch_size, rank, num_ranks)
        step = self._take(request)
        self._ahead = (request.next_step(), self._reader.submit(self._read, request.next_step()))
        return (micro_batch.to(self._device, non_blocking=True) for micro_batch in step)

    def epoch(self, cursor: int) -> int:
        """The pass over the data, from 0, that the sequence at cursor belongs to."""
        return cursor // self._num_sequences

    def close(self) -> None:
        """Stop reading ahead; the object cannot be used afterwards."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def _take(self, request: _Request) -> Tensor:
        guess, self._ahead = self._ahead, None
        if guess is not None and guess[0] == request:
            return guess[1].result()
        return self._read(request)

    def _read(self, request: _Request) -> Tensor:
        """int64 [micro-batches, micro_batch_size, L + 1] on the CPU, pinned for a GPU."""
        positions = request.positions()
        step = torch.empty(
            (*positions.shape, self._sequence_length + 1),
            dtype=torch.int64,
            pin_memory=self._device.type == "cuda",
        )
        sequences = self._order(positions.ravel()).reshape(positions.shape)
        # One micro-batch at a time, so that the check of its ids finds it in the cache.
        for indices, out in zip(sequences, step.numpy(), strict=True):
            self._split.read_sequences(indices, self._sequence_length, out)
        return step


def read_in_order(split: TokenSplit, sequence_length: int, start: int, stop: int) -> Tensor:
    """Sequences [start, stop) of a split in file order, int64 [stop - start, L + 1], on the CPU.

    For evaluation, which reads the same first sequences each time.
    """
    out = torch.empty((stop - start, sequence_length + 1), dtype=torch.int64)
    split.read_sequences(np.arange(start, stop, dtype=np.int64), sequence_length, out.numpy())
    return out
