"""Numbers of recent steps that wait on the device, so that it is read once an interval."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.distributed.collectives import mean_over_ranks
from gns_pretrain.distributed.mesh import World
from gns_pretrain.errors import TrainingError
from gns_pretrain.metrics.lines import TrainLine
from gns_pretrain.metrics.record import Record
from gns_pretrain.state import TrainState


class StepLog:
    """Collects steps and hands them to the record with one synchronisation an interval."""

    def __init__(self, record: Record, world: World) -> None:
        self._record = record
        self._world = world
        self._counters: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens_at_last_flush: int | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the steps' time what was done since the last flush."""
        self._since = time.perf_counter()

    def add(
        self,
        state: TrainState,
        *,
        loss: Tensor,
        gradient_norm: Tensor,
        lr: float,
        accumulation: int,
        step_tokens: int,
    ) -> None:
        """Note one step, counted in `state` already.

        Args:
            state: after the step.
            loss: 0-dim, this rank's mean, nats per token.
            gradient_norm: 0-dim, over all ranks.
            lr: learning rate of the step.
            accumulation: micro-batches of a rank.
            step_tokens: tokens of all ranks in the step.
        """
        self._losses.append(loss)
        self._norms.append(gradient_norm)
        self._counters.append(
            {
                "step": state.step,
                "samples": state.samples,
                "tokens": state.tokens,
                "lr": lr,
                "batch_size": state.batch_size,
                "micro_batch_size": state.micro_batch_size,
                "accumulation": accumulation,
            }
        )
        if self._tokens_at_last_flush is None:
            self._tokens_at_last_flush = state.tokens - step_tokens

    def flush(self) -> None:
        """Read the pending steps from the device and record them; all ranks together.

        Raises:
            TrainingError: a loss or a gradient norm is not finite; steps before it are recorded.
        """
        if not self._counters:
            return
        losses = mean_over_ranks(torch.stack(self._losses), self._world)
        values = torch.stack([losses, torch.stack(self._norms).to(losses)]).tolist()
        seconds = time.perf_counter() - self._since
        tokens = self._counters[-1]["tokens"] - self._tokens_at_last_flush
        for counters, loss, norm in zip(self._counters, *values, strict=True):
            raise_unless_finite(counters["step"], "loss", loss)
            raise_unless_finite(counters["step"], "gradient norm", norm)
            line = TrainLine(
                **counters,
                loss=loss,
                grad_norm=norm,
                step_seconds=seconds / len(self._counters),
                tokens_per_second=tokens / seconds,
            )
            self._record.write(line)
        self._tokens_at_last_flush = self._counters[-1]["tokens"]
        for pending in (self._counters, self._losses, self._norms):
            pending.clear()
        self.restart_clock()


def raise_unless_finite(step: int, name: str, value: float) -> None:
    """Stop a run one of whose losses, or whose gradient, has left the finite numbers."""
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {name} is {value}, not finite; the run stops and saves nothing of "
            "this step: lower optimizer.lr or look at the data, and start again under another "
            "run_name",
            on_all_ranks=True,
        )
