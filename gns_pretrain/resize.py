"""Changing the batch size of a run: its state, its optimizer and its record go together."""

from torch.optim import Optimizer

from gns_pretrain.batch_size.controller import Controller, lr_multiplier
from gns_pretrain.batch_size.feasible import Split
from gns_pretrain.batch_size.policies import Position
from gns_pretrain.metrics.lines import BatchSizeLine, ShadowLine
from gns_pretrain.metrics.record import Record
from gns_pretrain.metrics.step_log import StepLog
from gns_pretrain.optim.token_ties import retie
from gns_pretrain.state import TrainState


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
    retie(optimizer, split.batch_size, lr_multiplier=multiplier)
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
