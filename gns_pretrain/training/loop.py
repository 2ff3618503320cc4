"""A whole training run on one screen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gns_pretrain.batch_size import accumulation_steps
from gns_pretrain.batch_size.controller import Controller, lr_multiplier
from gns_pretrain.batch_size.feasible import Split
from gns_pretrain.batch_size.policies import Position
from gns_pretrain.data.batches import Batches
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.base import set_learning_rate, update_half_life
from gns_pretrain.parallel.collectives import any_rank
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import BatchSizeLine, ShadowLine, ValidationLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.evaluate import evaluate
from gns_pretrain.training.schedule import Schedule
from gns_pretrain.training.state import TrainState, crossed
from gns_pretrain.training.step import train_step
from gns_pretrain.training.step_log import StepLog, note_noise, raise_unless_finite

# Changing the batch size of a run: its state, its optimizer and its record go together.


def resize(
    state: TrainState,
    optimizer: Optimizer,
    record: Record,
    split: Split,
    *,
    target: float | None,
    multiplier: float,
    why: str,
) -> None:
    """Give the coming step another batch size and say so; before it, between two steps.

    Args:
        state: of the run.
        optimizer: of the run; what is tied to tokens follows the batch.
        record: of the run.
        split: the new size, as the ranks take it.
        target: what the policy wanted, sequences; None where the ranks alone made it necessary.
        multiplier: on the scheduled learning rate, from the new size.
        why: for people.
    """
    previous = state.batch_size
    state.change_batch_size(
        split.batch_size, micro_batch_size=split.micro_batch_size, lr_multiplier=multiplier
    )
    update_half_life(optimizer, split.batch_size, lr_multiplier=multiplier)
    line = BatchSizeLine(
        step=state.step + 1,
        previous=previous,
        new=split.batch_size,
        target=target,
        lr_multiplier=multiplier,
    )
    record.write(line, why=why)


def fit_to_ranks(
    state: TrainState, controller: Controller, optimizer: Optimizer, record: Record
) -> None:
    """Split a batch over the ranks at hand; one that they cannot take becomes the next larger.

    That may lie above the cap: a batch never shrinks, and its cap need not be feasible here.
    """
    sizes = controller.sizes
    split = sizes.at_least(state.batch_size)
    if split.batch_size == state.batch_size:
        state.micro_batch_size = split.micro_batch_size
        return
    why = f"{state.batch_size} is not feasible on {sizes}: the next larger size, {split}"
    if controller.cap is not None and split.batch_size > controller.cap:
        why += f", above batch_size.cap={controller.cap}"
    resize(
        state,
        optimizer,
        record,
        split,
        target=None,
        multiplier=lr_multiplier(
            controller.lr_scaling, split.batch_size, controller.initial_batch_size
        ),
        why=why,
    )


def note_shadow(
    shadow: Controller, position: Position, state: TrainState, record: Record, log: StepLog
) -> None:
    """Let a policy that is not followed decide for itself, and record what it would have done."""
    previous = state.shadow_batch_sizes.get(shadow.name, shadow.initial_batch_size)
    decision = shadow.decide(position, previous, state.averages)
    if decision is None:
        return
    log.flush()  # so that the record's steps stay in order
    state.shadow_batch_sizes[shadow.name] = decision.split.batch_size
    line = ShadowLine(
        policy=shadow.name,
        step=position.step,
        previous=previous,
        new=decision.split.batch_size,
        target=decision.target,
        lr_multiplier=decision.lr_multiplier,
    )
    record.write(line)


@dataclass(frozen=True)
class LoopSettings:
    """The numbers that the loop itself turns on."""

    token_budget: int  # the run ends with the first whole step that reaches it
    sequence_length: int
    evaluate_every_tokens: int
    save_every_steps: int
    log_every_steps: int
    max_gradient_norm: float | None


@dataclass
class Run:
    """All objects of a run, built; what changes is in model, optimizer and state."""

    settings: LoopSettings
    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batches: Batches
    validation_sequences: Tensor  # int64 [n, L + 1]
    state: TrainState
    checkpoints: Checkpoints
    record: Record
    noise_scale: NoiseScaleSettings
    meter: NoiseMeter | None  # None where no geometry is measured
    controller: Controller  # of the batch size
    shadows: list[Controller]  # policies that are logged and not followed


def train(
    run: Run,
    should_stop: Callable[[], bool],
    *,
    step: "Callable[[Run, StepLog], list[Reading]] | None" = None,
) -> bool:
    """Train until the token budget is reached or a rank is asked to stop.

    Args:
        run: built.
        should_stop: asked once after every step, on each rank; one True stops all of them.
        step: takes one optimizer step; None is `one_step`.

    Returns:
        Whether the run is finished; False after a stop, when it is saved and can be resumed.
    """
    settings, state, world = run.settings, run.state, run.world
    log = StepLog(run.record, world)
    take_step = step or one_step
    stopping = False
    while state.tokens < settings.token_budget and not stopping:
        tokens_before = state.tokens
        choose_batch_size(run, log)
        readings = take_step(run, log)
        done = state.tokens >= settings.token_budget
        stopping = any_rank(should_stop(), world)
        evaluating = (
            state.step == 1
            or done
            or crossed(settings.evaluate_every_tokens, before=tokens_before, after=state.tokens)
        )
        saving = done or stopping or state.step % settings.save_every_steps == 0
        if readings or evaluating or saving or state.step % settings.log_every_steps == 0:
            log.flush()
        for reading in readings:
            note_noise(run.record, state, reading, settings=run.noise_scale)
            for controller in (run.controller, *run.shadows):
                controller.include(state.averages, reading.total)
        if evaluating:
            validate(run)
        if saving:
            run.checkpoints.save(run.model, run.optimizer, state)
        if evaluating or saving:
            log.restart_clock()
    return state.tokens >= settings.token_budget


def choose_batch_size(run: Run, log: StepLog) -> None:
    """Let the policy decide on the coming step, and the shadows say what they would have done.

    What is decided on was in the last checkpoint too, so a run that is killed decides once more.
    """
    state = run.state
    position = Position.after(
        state.step,
        samples=state.samples,
        tokens=state.tokens,
        token_budget=run.settings.token_budget,
        sequence_length=run.settings.sequence_length,
    )
    if decision := run.controller.decide(position, state.batch_size, state.averages):
        log.flush()
        resize(
            state,
            run.optimizer,
            run.record,
            decision.split,
            target=decision.target,
            multiplier=decision.lr_multiplier,
            why=decision.why,
        )
    for shadow in run.shadows:
        note_shadow(shadow, position, state, run.record, log)


def one_step(run: Run, log: StepLog) -> list[Reading]:
    """Take the next sequences, update the weights, count; returns what the meter read."""
    state, world = run.state, run.world
    accumulation = accumulation_steps(
        state.batch_size, num_ranks=world.num_ranks, micro_batch_size=state.micro_batch_size
    )
    factor = run.schedule.factor(state.samples) * state.lr_multiplier
    lr = set_learning_rate(run.optimizer, factor)
    result = train_step(
        run.model,
        run.optimizer,
        run.batches.micro_batches(
            state.samples,
            batch_size=state.batch_size,
            micro_batch_size=state.micro_batch_size,
        ),
        accumulation=accumulation,
        max_gradient_norm=run.settings.max_gradient_norm,
        batch_size=state.batch_size,
        meter=meter_of_step(run, accumulation),
    )
    epoch = run.batches.epoch(state.samples)
    state.advance(sequences=state.batch_size, sequence_length=run.settings.sequence_length)
    log.add(
        state,
        loss=result.loss,
        gradient_norm=result.gradient_norm,
        lr=lr,
        accumulation=accumulation,
        step_tokens=state.batch_size * run.settings.sequence_length,
    )
    if epoch == 0 and run.batches.epoch(state.samples) > 0:
        run.record.message(
            f"step {state.step:,}: every sequence of the training data has been used; "
            "from here on they come again, in another order each epoch"
        )
    return result.readings


def meter_of_step(run: Run, accumulation: int) -> NoiseMeter | None:
    """The noise meter if the coming step is to be measured and can be."""
    step = run.state.step + 1
    if run.meter is None or not run.noise_scale.measures_at(step):
        return None
    if accumulation * run.world.num_ranks < 2:
        run.record.message(
            f"step {step:,}: the noise scale is not measured: it compares at least 2 micro-batches "
            "and this step has 1; use a smaller micro_batch_size"
        )
        return None
    return run.meter


def validate(run: Run) -> None:
    """Take the validation loss and record it.

    Raises:
        TrainingError: it is not finite: the step before has ruined the weights.
    """
    loss = evaluate(
        run.model,
        run.validation_sequences,
        chunk=run.state.micro_batch_size,
        world=run.world,
    )
    raise_unless_finite(run.state.step, "validation loss", loss)
    run.record.write(ValidationLine(step=run.state.step, tokens=run.state.tokens, loss=loss))
