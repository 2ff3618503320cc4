"""A whole training run on one screen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gns_pretrain.batch_size import AdaptiveBatchSize, Decision
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.optim.averaging import averaged_weights, set_progress, two_faced
from gns_pretrain.optim.base import set_learning_rate, update_half_life
from gns_pretrain.optim.combined import rules_of
from gns_pretrain.parallel.collectives import any_rank
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import BatchSizeLine, ShadowLine, ValidationLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.bad_steps import BadSteps
from gns_pretrain.training.checkpoint import Checkpoints, CheckpointSettings
from gns_pretrain.training.schedule import Schedule
from gns_pretrain.training.step import train_step
from gns_pretrain.training.step_log import (
    StepLog,
    peak_memory,
    raise_unless_finite,
    record_noise,
)
from gns_pretrain.training.workload import Workload


@dataclass
class Run:
    """All objects of a run, built; what changes is in model, optimizer and adaptive."""

    world: World
    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    workload: Workload
    adaptive: AdaptiveBatchSize  # counts steps and samples, which are the data cursor
    checkpoints: Checkpoints
    record: Record
    meter: NoiseMeter | None  # None where no geometry is measured
    bad_steps: BadSteps | None  # None where no step is skipped
    # Settings that the loop itself reads, under their names in the configuration.
    seed: int
    gradient_clip: float | None
    checkpoint: CheckpointSettings
    metrics: MetricsSettings
    peak_speed: float | None = None  # in the workload's unit, at the peak FLOP/s of all GPUs

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes beside weights and optimizer state, fit for JSON."""
        state = self.adaptive.state_dict() | (self.meter.state_dict() if self.meter else {})
        state |= {"seed": self.seed, "optimizer": rules_of(self.optimizer)}
        if self.bad_steps:
            state["bad_steps"] = self.bad_steps.state_dict()
        return state


def train(
    run: Run,
    should_stop: Callable[[], bool],
    *,
    step: Callable[[Run, StepLog], list[Reading]] | None = None,
) -> bool:
    """Train until the budget is reached or a rank is asked to stop; then all is saved.

    Args:
        should_stop: asked once after every step, on each rank; one True stops all of them.
        step: takes one optimizer step and returns what was measured; None is `one_step`.

    Returns:
        Whether the run is finished; False after a stop, when it is saved and can be resumed.
    """
    adaptive = run.adaptive
    unit, budget = run.workload.unit, run.workload.total_samples
    log = log_of(run)
    take_step = step or one_step
    stopping = save_due = False
    while adaptive.samples < budget and not stopping:
        position = unit.of(adaptive.samples)
        choose_batch_size(run, log)
        readings = take_step(run, log)
        done = adaptive.samples >= budget
        stopping = any_rank(should_stop() or run.checkpoints.has_failed, run.world)
        evaluating = (
            adaptive.steps == 1
            or done
            or crossed(
                run.workload.evaluate_every, before=position, after=unit.of(adaptive.samples)
            )
        )
        save_due |= adaptive.steps % run.checkpoint.every_steps == 0
        # A save would wait for the host threads of a pending reading, and so comes with it.
        saving = done or stopping or (save_due and not (run.meter and run.meter.pending))
        if readings or evaluating or saving or adaptive.steps % run.metrics.log_every == 0:
            log.flush()
        record_noise(run.record, adaptive.steps, readings, adaptive.averages)
        if evaluating:
            validate(run)
        if saving:
            run.record.sync()
            run.checkpoints.save(run.model, run.optimizer, run.state_dict())
            save_due = False
        if evaluating or saving:
            log.restart_clock()
    run.checkpoints.wait()
    return adaptive.samples >= budget


def rehearse(run: Run, num_steps: int) -> None:
    """Take the first steps and an evaluation, record them, and save nothing."""
    log = log_of(run)
    for _ in range(num_steps):
        choose_batch_size(run, log)
        readings = one_step(run, log)
        log.flush()
        record_noise(run.record, run.adaptive.steps, readings, run.adaptive.averages)
    validate(run)
    peak = peak_memory(run.world.device) / 2**30
    run.record.message(f"peak memory of rank 0: {peak:.2f} GiB")


def log_of(run: Run) -> StepLog:
    """Return what collects a run's steps for its record."""
    unit, peak = run.workload.unit, run.peak_speed
    return StepLog(run.record, run.world, run.adaptive, unit, peak_speed=peak)


def choose_batch_size(run: Run, log: StepLog) -> None:
    """Let the policies decide on the coming step; follow one of them, record all."""
    if run.adaptive.seconds_due:
        log.flush()
    decision, of_shadows = run.adaptive.decide()
    if decision or of_shadows:
        log.flush()  # so that the record's steps stay in order
    if decision:
        apply_decision(decision, run.adaptive.steps + 1, run.optimizer, run.record)
    for shadow in of_shadows:
        fields = shadow.record_fields(run.adaptive.steps + 1)
        run.record.write(ShadowLine(policy=shadow.policy, **fields))


def apply_decision(decision: Decision, step: int, optimizer: Optimizer, record: Record) -> None:
    """Let optimizer and record follow the batch size, which changes with `step`."""
    size, multiplier = decision.split.batch_size, decision.lr_multiplier
    tied = update_half_life(optimizer, size, lr_multiplier=multiplier)
    fields = decision.record_fields(step)
    record.write(BatchSizeLine(**fields | {"more": fields["more"] | tied}))


def one_step(run: Run, log: StepLog) -> list[Reading]:
    """Take the next samples, update the weights, count and average; return the readings."""
    adaptive = run.adaptive
    factor = run.schedule.factor(adaptive.samples) * adaptive.lr_multiplier
    lr = set_learning_rate(run.optimizer, factor)
    set_progress(run.optimizer, adaptive.samples / run.workload.total_samples)
    result = train_step(
        run.model,
        run.optimizer,
        run.workload.micro_batches(
            adaptive.samples,
            batch_size=adaptive.batch_size,
            micro_batch_size=adaptive.micro_batch_size,
        ),
        accumulation=adaptive.accumulation,
        gradient_clip=run.gradient_clip,
        batch_size=adaptive.batch_size,
        meter=meter_of_step(run),
        bad_steps=run.bad_steps,
        step=adaptive.steps + 1,
        is_due=measures(run),
    )
    readings = result.readings
    if run.meter and is_last_step(run):
        readings = [*readings, *run.meter.read_pending()]
    samples_before = adaptive.samples
    adaptive.observe(reading.total for reading in readings)
    log.add(result, lr=lr, samples_before=samples_before)
    if run.bad_steps and result.skipped:
        log.flush()
        run.record.message(f"step {adaptive.steps:,} is skipped: {result.skipped}")
        run.bad_steps.raise_beyond_limit(adaptive.steps, result.skipped)
    used_before = run.workload.used_up(samples_before)
    for name in run.workload.used_up(adaptive.samples):
        if name not in used_before:
            run.record.message(
                f"step {adaptive.steps:,}: every {run.workload.unit.sample} of {name} has been "
                "used; from here on they repeat, in another order each epoch"
            )
    return readings


def is_last_step(run: Run) -> bool:
    """Whether the coming step reaches the budget."""
    return run.adaptive.samples + run.adaptive.batch_size >= run.workload.total_samples


def measures(run: Run) -> bool:
    """Whether the noise scale is measured in the coming step."""
    adaptive, every = run.adaptive, run.workload.measure_every
    if run.meter is None:
        return False
    if every is None:
        return run.meter.settings.measures_at(adaptive.steps + 1)
    after = adaptive.samples + adaptive.batch_size
    return adaptive.steps == 0 or crossed(every, before=adaptive.samples, after=after)


def meter_of_step(run: Run) -> NoiseMeter | None:
    """Return the noise meter, unless it is to measure the coming step and cannot."""
    step = run.adaptive.steps + 1
    if run.meter is None or not measures(run):
        return run.meter
    fewest = run.meter.settings.fewest_samples
    if (samples := run.adaptive.accumulation * run.world.num_data_ranks) < fewest:
        run.record.message(
            f"step {step:,}: the noise scale is not measured: it compares at least {fewest} "
            f"micro-batches and this step has {samples}; use a smaller micro_batch_size"
        )
        return None
    return run.meter


def validate(run: Run) -> None:
    """Evaluate and record what is found; DivergedError if the loss is not finite."""
    adaptive, unit = run.adaptive, run.workload.unit
    with averaged_weights(run.model, run.optimizer):
        found = run.workload.evaluate(run.model, chunk=adaptive.micro_batch_size, world=run.world)
    raise_unless_finite(adaptive.steps, "validation loss", found.loss)
    counts: dict[str, Any] = {unit.name: unit.of(adaptive.samples)}
    more: dict[str, Any] = dict(found.more)
    if two_faced(run.optimizer):
        more["weights"] = "averaged"
    run.record.write(ValidationLine(step=adaptive.steps, **counts, loss=found.loss, more=more))


def crossed(every: int, *, before: int, after: int) -> bool:
    """Whether a counter that went from `before` to `after` passed a multiple of `every`."""
    return before // every != after // every
