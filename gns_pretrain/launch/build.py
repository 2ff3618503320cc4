"""Settings to objects, by name."""

import dataclasses
import re
from pathlib import Path

import torch

from gns_pretrain.batch_size.controller import BatchSizer, Controller
from gns_pretrain.config.checks import feasible_sizes
from gns_pretrain.config.compose import as_dict
from gns_pretrain.config.schema import Config
from gns_pretrain.data.batches import Batches, read_in_order
from gns_pretrain.data.settings import open_splits
from gns_pretrain.data.shards import TokenShards, joint_fingerprint
from gns_pretrain.data.staging import staged
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.optim.base import keep_token_half_life, remember_peaks
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.runs.directory import CHECKPOINTS
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.loop import Run, fit_to_ranks
from gns_pretrain.training.schedule import Schedule, steps_in_budget
from gns_pretrain.training.state import TrainState


def data_fingerprint(splits: tuple[TokenShards, TokenShards]) -> str:
    """One hash for the training and validation data."""
    return joint_fingerprint(split.fingerprint for split in splits)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Dtype of the forward and backward passes' copies of the weights."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]


def build_model(config: Config, world: World, *, data_vocab_size: int) -> torch.nn.Module:
    """The model with its first weights, compiled where asked and laid over the ranks."""
    shape = config.model
    if shape.vocab_size is None:
        shape = dataclasses.replace(shape, vocab_size=data_vocab_size)
    with world.device:
        model = Llama(shape)
    model.init_weights(config.seed)
    if config.compile == "always" or (config.compile == "auto" and world.device.type == "cuda"):
        model.compile_blocks()
    return parallelize(model, world, compute_dtype=compute_dtype(config, world.device))


def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over a model that `parallelize` returned, at its peak learning rates."""
    optimizer = config.optimizer.build(model)
    remember_peaks(optimizer)
    if config.optimizer.tie_to_tokens:
        keep_token_half_life(optimizer, config.batch_size.initial)
    return optimizer


def open_record(
    config: Config, world: World, directory: Path, *, resume_step: int, run_id: str
) -> Record:
    """The run's record and its views, from this step on."""
    return Record(
        directory,
        shown_as(config),
        is_main=world.is_main,
        resume_step=resume_step,
        config=as_dict(config),
        token_budget=config.token_budget,
        run_id=run_id,
    )


def build_run(config: Config, world: World, directory: Path, *, run_id: str = "") -> Run:
    """Everything that a run needs, at its first step or where its last checkpoint stood.

    Args:
        config: its settings.
        world: its ranks, which all call this.
        directory: its folder.
        run_id: its name at a tracking service, needed on the main rank where one is told.
    """
    torch.manual_seed(config.seed)
    training, validation = open_splits(staged(config.data))
    sequence_length = config.data.sequence_length
    model = build_model(config, world, data_vocab_size=training.vocab_size)
    optimizer = build_optimizer(config, model)
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=config.checkpoint.keep, world=world)
    sizer = build_batch_sizer(config, num_ranks=world.num_ranks)
    state, damaged = checkpoints.load_latest(model, optimizer, sizer)
    resumed = state is not None
    state = state or first_state(sizer)
    record = open_record(config, world, directory, resume_step=state.step, run_id=run_id)
    for line in damaged:
        record.message(f"{line}; the one before it is used")
    if resumed:
        record.message(f"resumed from step {state.step:,}, {state.tokens:,} tokens")
    fit_to_ranks(state, sizer, optimizer, record)
    for prefix, policy in config.batch_size.policies:
        if (note := policy.kind.note(policy)) is not None:
            record.message(f"{prefix}.{note}")
    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        schedule=Schedule(
            config.schedule,
            initial_batch_size=config.batch_size.initial,
            total_steps=initial_total_steps(config),
        ),
        batches=Batches(
            training,
            sequence_length=sequence_length,
            seed=config.seed,
            device=world.device,
            rank=world.rank,
            num_ranks=world.num_ranks,
        ),
        validation_sequences=read_in_order(
            validation, sequence_length, 0, config.evaluation.num_sequences
        ).to(world.device),
        state=state,
        checkpoints=checkpoints,
        record=record,
        batch_sizer=sizer,
        meter=NoiseMeter(model, world, config.noise_scale)
        if config.noise_scale.geometries
        else None,
        token_budget=config.token_budget,
        sequence_length=sequence_length,
        gradient_clip=config.gradient_clip,
        noise_scale=config.noise_scale,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        metrics=config.metrics,
    )


def initial_total_steps(config: Config) -> int:
    """Steps that the token budget would take at the initial batch."""
    return steps_in_budget(
        config.token_budget,
        batch_size=config.batch_size.initial,
        sequence_length=config.data.sequence_length,
    )


def build_batch_sizer(config: Config, *, num_ranks: int) -> BatchSizer:
    """The policy that is followed and the shadows, with the averages that they read."""
    controllers = [
        Controller(
            policy.label,
            policy.kind(
                policy,
                initial_batch_size=config.batch_size.initial,
                total_steps=initial_total_steps(config),
            ),
            feasible_sizes(config, policy, num_ranks=num_ranks),
        )
        for _, policy in config.batch_size.policies
    ]
    noise_scale = config.noise_scale
    return BatchSizer(controllers, noise_scale.smoothing, measured=noise_scale.measured)


def first_state(sizer: BatchSizer) -> TrainState:
    """The state before the first step.

    Raises:
        InputError: the ranks cannot take the initial batch.
    """
    followed = sizer.followed
    return TrainState.before_first_step(
        followed.sizes.require(followed.policy.initial_batch_size, "batch_size.initial")
    )


def shown_as(config: Config) -> MetricsSettings:
    """Settings of the record; runs that differ in the seed alone are one group at W&B."""
    wandb = config.metrics.wandb
    group = wandb.group or re.sub(r"[-_]?seed=?\d+", "", config.run_name)
    return dataclasses.replace(config.metrics, wandb=dataclasses.replace(wandb, group=group))
