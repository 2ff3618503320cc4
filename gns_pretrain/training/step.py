"""One optimizer step: micro-batches, accumulation, clipping, update.

Its phases are named for the profiler, the measurement by the tap itself; without a profiler a name
costs some 10 microseconds.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.parallel.collectives import clip_gradient_norm
from gns_pretrain.parallel.running_statistics import update_running_statistics
from gns_pretrain.parallel.sharding import gradient_synchronisation
from gns_pretrain.training.bad_steps import BadSteps
from gns_pretrain.training.workload import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What one step measured; tensors stay on the device until they are read."""

    loss: Tensor  # 0-dim float32, nats, mean over this rank's micro-batches
    gradient_norm: Tensor  # 0-dim float32, before clipping, over all ranks
    readings: list[Reading] = field(default_factory=list)  # of the noise scale, read in this step
    skipped: str | None = None  # why the weights were left as they were


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    accumulation: int,
    gradient_clip: float | None,
    batch_size: int,
    meter: NoiseMeter | None = None,
    bad_steps: BadSteps | None = None,
    step: int | None = None,
    is_due: bool | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update.

    Args:
        micro_batches: `accumulation` of them.
        gradient_clip: largest global gradient norm; None clips nothing.
        batch_size: samples of the step over all ranks.
        meter: of the noise scale.
        bad_steps: leaves the update out, and what was measured, if it finds the step bad.
        step: its number, from 1, by which the meter measures and reads; None measures this step.
        is_due: whether a numbered step is measured; None: as the meter's settings say.
    """
    measured: AbstractContextManager[None] = nullcontext()
    if meter is not None:
        measured = meter.measure() if step is None else meter.step(step, is_due=is_due)
    with measured:
        losses = accumulate_gradients(model, micro_batches, accumulation=accumulation, meter=meter)
    readings = meter.read(batch_size) if meter else []
    with record_function("optimizer"):
        norm = clip_gradient_norm(list(model.parameters()), gradient_clip)
        loss = torch.stack(losses).mean()
        skipped = bad_steps.reason(loss, norm) if bad_steps else None
        if skipped is None:
            optimizer.step()
        elif meter:
            readings = meter.without_this_step(readings)
        optimizer.zero_grad(set_to_none=True)
    update_running_statistics(model, keep=skipped is None)
    return StepResult(loss, norm, readings, skipped)


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    accumulation: int,
    meter: NoiseMeter | None = None,
) -> list[Tensor]:
    """Leave the mean gradient over all ranks' micro-batches in the weights' `.grad`.

    Args:
        model: without gradients.
        micro_batches: `accumulation` of them.
        meter: takes each micro-batch as a sample, if given.

    Returns:
        The loss of each micro-batch, 0-dim, nats.
    """
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == accumulation - 1
        sample = meter.sample() if meter else nullcontext()
        # Ranks communicate once a step: the last micro-batch's backward reduces the whole sum.
        with sample, gradient_synchronisation(model, is_last):
            with record_function("forward"):
                loss: Tensor = model(*micro_batch)
            with record_function("backward"):
                (loss / accumulation).backward()
        losses.append(loss.detach())
    assert len(losses) == accumulation
    return losses
