"""One rank's micro-batches of a step, read by a background thread before they are asked for."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Step(NamedTuple):
    """What a step consumes; in samples over all ranks."""

    cursor: int  # consumed before it
    batch_size: int
    micro_batch_size: int

    def of_rank(self, places: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
        """Split the places of a step's samples, [batch_size]: micro-batch j to rank j % num_ranks.

        Returns:
            [micro-batches, micro_batch_size], this rank's.
        """
        return places.reshape(-1, self.micro_batch_size)[rank::num_ranks]


class ReadAhead:
    """Reads the step that is asked for, and the next one while that is computed.

    It guesses that the sizes stay the same; a wrong guess is thrown away. It holds no position of
    its own: the caller passes the cursor, so that a checkpoint is one integer.

    Args:
        read: all micro-batches of this rank in a step, each tensor [micro-batches, ...], on the
            CPU.
        device: to which they are moved one by one.
    """

    def __init__(self, read: Callable[[Step], tuple[Tensor, ...]], device: torch.device) -> None:
        self._read, self._device = read, device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[Step, Future[tuple[Tensor, ...]]] | None = None

    def micro_batches(self, step: Step) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's micro-batches on the device. A failed read surfaces here."""
        assert step.batch_size % step.micro_batch_size == 0, step
        guess = self._ahead
        tensors = guess[1].result() if guess and guess[0] == step else self._read(step)
        following = step._replace(cursor=step.cursor + step.batch_size)
        self._ahead = (following, self._reader.submit(self._read, following))
        return (
            tuple(each.to(self._device, non_blocking=True) for each in micro_batch)
            for micro_batch in zip(*tensors, strict=True)
        )

    def close(self) -> None:
        """Stop reading ahead; the object cannot be used afterwards."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
