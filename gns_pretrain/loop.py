"""A whole training run on one screen."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gns_pretrain.batch_size import accumulation_steps
from gns_pretrain.batch_size.controller import Controller
from gns_pretrain.batch_size.policies import Position
from gns_pretrain.data.batches import Batches
from gns_pretrain.distributed.checkpoint import Checkpoints
from gns_pretrain.distributed.collectives import any_rank
from gns_pretrain.distributed.mesh import World
from gns_pretrain.distributed.noise_meter import NoiseMeter, Reading
from gns_pretrain.evaluate import evaluate
from gns_pretrain.metrics.lines import ValidationLine
from gns_pretrain.metrics.noise_log import note_noise
from gns_pretrain.metrics.record import Record
from gns_pretrain.metrics.step_log import StepLog, raise_unless_finite
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.groups import set_learning_rate
from gns_pretrain.resize import note_shadow, resize
from gns_pretrain.schedule import Schedule
from gns_pretrain.state import TrainState, crossed
from gns_pretrain.step import train_step
from gns_pretrain.stop import StopRequest


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


def train(run: Run, stop: StopRequest) -> bool:
    """Train until the token budget is reached or somebody asks to stop.

    Returns:
        Whether the run is finished; False after a stop, when it is saved and can be resumed.
    """
    settings, state, world = run.settings, run.state, run.world
    log = StepLog(run.record, world)
    stopping = False
    while state.tokens < settings.token_budget and not stopping:
        tokens_before = state.tokens
        choose_batch_size(run, log)
        readings = one_step(run, log)
        done = state.tokens >= settings.token_budget
        stopping = any_rank(stop.requested, world)
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
            rank=world.rank,
            num_ranks=world.num_ranks,
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
