"""From a position in the run to the micro-batches of one rank, read ahead by a background thread.

The position (cursor) is one integer: the number of sequences consumed so far. A step consumes the
sequences at positions [cursor, cursor + B) of the run's order; its micro-batch j is the j-th
contiguous block of them, whichever rank computes it.

Of a mixture, the step's sequences are shuffled first. Sources are interleaved evenly, in an order
that repeats: without it one of two sources could come to all even micro-batches, which the noise
scale compares with the odd ones.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gns_pretrain.data.mixture import Mixture
from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.read_ahead import ReadAhead, Step
from gns_pretrain.data.shards import TokenShards


class Batches:
    """One rank's part of the training sequences, each source in a seeded order, epoch after epoch.

    While a step is computed, a thread reads the next one (`ReadAhead`).
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        sequence_length: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self._mixture = mixture
        self._sequence_length = sequence_length
        self._seed = seed
        self._orders = [
            SequenceOrder(source.tokens.num_sequences(sequence_length), seed)
            for source in mixture.sources
        ]
        self._on_gpu = device.type == "cuda"
        self._rank, self._num_ranks = rank, num_ranks
        self._ahead = ReadAhead(self._read, device)

    def micro_batches(
        self, cursor: int, *, batch_size: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        """Yield this rank's micro-batches of a step, int64 [micro_batch_size, L + 1] on the device.

        Micro-batch j of the step goes to rank j % num_ranks. A failed read surfaces here.

        Args:
            cursor: sequences consumed before this step, over all ranks.
            batch_size: sequences of the step over all ranks, a multiple of micro_batch_size.
        """
        step = Step(cursor, batch_size, micro_batch_size)
        return (sequences for (sequences,) in self._ahead.micro_batches(step))

    def used_up(self, cursor: int) -> list[str]:
        """Name the sources of which every sequence was consumed before cursor: they repeat."""
        counts = self._mixture.counts(cursor)
        return [
            source.name
            for source, count, order in zip(
                self._mixture.sources, counts, self._orders, strict=True
            )
            if count >= order.num_sequences
        ]

    def close(self) -> None:
        """Stop reading ahead; the object cannot be used afterwards."""
        self._ahead.close()

    def _read(self, request: Step) -> tuple[Tensor]:
        """Read int64 [micro-batches, micro_batch_size, L + 1] to the CPU, pinned for a GPU."""
        places = np.arange(request.batch_size, dtype=np.int64)
        if len(self._orders) > 1:
            shuffled = SequenceOrder(request.batch_size, self._seed)
            places = shuffled(request.cursor * request.batch_size + places)
        positions = request.of_rank(request.cursor + places, self._rank, self._num_ranks)
        step = torch.empty(
            (*positions.shape, self._sequence_length + 1),
            dtype=torch.int64,
            pin_memory=self._on_gpu,
        )
        sources, indices = self._mixture.locate(positions)
        for number, order in enumerate(self._orders):
            indices[sources == number] = order(indices[sources == number])
        # One micro-batch at a time, so that the check of its ids finds it in the cache.
        for of_micro_batch in zip(sources, indices, step.numpy(), strict=True):
            self._mixture.read_sequences(*of_micro_batch, self._sequence_length)
        return (step,)


def inputs_and_targets(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Split sequences, [n, L + 1], into what a model reads and what it predicts, each [n, L]."""
    return sequences[:, :-1], sequences[:, 1:]


def read_in_order(tokens: TokenShards, sequence_length: int, start: int, stop: int) -> Tensor:
    """Read sequences [start, stop) in file order, int64 [stop - start, L + 1], to the CPU.

    For evaluation, which reads the same first sequences each time.
    """
    out = torch.empty((stop - start, sequence_length + 1), dtype=torch.int64)
    tokens.read_sequences(np.arange(start, stop, dtype=np.int64), sequence_length, out.numpy())
    return out
