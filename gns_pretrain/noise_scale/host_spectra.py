"""Eigenvalues of a measurement, taken on the host while the next steps train.

LAPACK on a CPU core needs no iteration to be proven and no time of a GPU: copies to pinned memory
run on a stream of their own, and each problem is one thread's. Its bits depend on neither the
number of threads nor their load.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from gns_pretrain.noise_scale.geometries import SpectralTotal
from gns_pretrain.system.processes import Worker, available_cores

BYTES_AHEAD = 2**30  # of matrices that the GPU holds because their copies are under way


@dataclass(frozen=True)
class PendingTotal:
    """One of a weight's totals, under way on the host."""

    weight: int
    column: int
    value: Future[float]


class HostSpectra:
    """Hands the totals of one rank that take eigenvalues to the host's threads.

    Args:
        device: of the matrices.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def submit(self, totals: Iterable[SpectralTotal]) -> list[PendingTotal]:
        """Copy the matrices and have their totals computed; nothing is waited for.

        The device waits where copies lag by `BYTES_AHEAD`, for the memory that they hold.
        """
        pending = []
        under_way: deque[tuple[int, torch.cuda.Event]] = deque()
        ahead = 0
        for total in totals:
            matrices, copied = self._on_host(total.matrices)
            value = host_threads().start(self._computation(total.function, matrices, copied))
            pending.append(PendingTotal(total.weight, total.column, value))
            if copied is None:
                continue
            under_way.append((sum(matrix.nbytes for matrix in total.matrices), copied))
            ahead += under_way[-1][0]
            while ahead > BYTES_AHEAD:
                num_bytes, oldest = under_way.popleft()
                torch.cuda.current_stream(self._device).wait_event(oldest)
                ahead -= num_bytes
        return pending

    def gathered(self, pending: Iterable[PendingTotal], table: Tensor) -> Tensor:
        """Wait for totals and return them in a table's shape and place, zeros beside them.

        Raises:
            Exception: what a computation has raised.
        """
        values = torch.zeros(table.shape, dtype=table.dtype, pin_memory=self._on_gpu)
        for total in pending:
            values[total.weight, total.column] = total.value.result()
        return values.to(table.device, non_blocking=True)

    def _on_host(
        self, matrices: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        """Return copies in pinned memory, and what has happened once they are whole."""
        if not self._on_gpu:
            return matrices, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = tuple(
                torch.empty_like(matrix, device="cpu", pin_memory=True).copy_(
                    matrix, non_blocking=True
                )
                for matrix in matrices
            )
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        for matrix in matrices:
            matrix.record_stream(self._stream)  # its memory is free once it is copied
        return copies, copied

    def _computation(
        self,
        function: Callable[..., Tensor],
        matrices: tuple[Tensor, ...],
        copied: torch.cuda.Event | None,
    ) -> Callable[[], float]:
        def compute() -> float:
            if copied is not None:
                # A thread begins on GPU 0, where another rank may be alone.
                with torch.cuda.device(self._device):
                    copied.synchronize()
            return function(*matrices).item()

        return compute


@cache
def host_threads() -> Worker:
    """This process's threads for matrices: one a core of this rank, of the lowest priority.

    torchrun and this project's launcher say how many ranks share the cores; srun gives each rank
    its own.
    """
    count = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    all_prepared = threading.Barrier(count)

    def prepare() -> None:
        torch.get_num_threads()  # the first use in a thread takes the default
        torch.set_num_threads(1)  # this thread's, and the default of threads to come
        with suppress(AttributeError, OSError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        all_prepared.wait()

    worker = Worker(count)
    before = torch.get_num_threads()
    for number, thread in enumerate(worker.threads):
        thread.name = f"noise-scale-{number}"
    for prepared in [worker.start(prepare) for _ in range(count)]:
        prepared.result()
    torch.set_num_threads(before)
    worker.stop_at_exit()
    return worker
