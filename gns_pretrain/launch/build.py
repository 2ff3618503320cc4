"""From settings to the objects of a run."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gns_pretrain.batch_size import AdaptiveBatchSize
from gns_pretrain.batch_size.controller import SavedState
from gns_pretrain.config.schema import Config
from gns_pretrain.data.staging import staged
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.optim.base import (
    TIED,
    keep_token_half_life,
    remember_peaks,
    set_timescale,
    update_half_life,
)
from gns_pretrain.parallel.collectives import errors_of_main
from gns_pretrain.parallel.mesh import World, beside_training
from gns_pretrain.runs.directory import CONFIG
from gns_pretrain.runs.history import note_checkpoint
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    deciding_settings,
    flatten,
    identifying_settings,
    settings_of_run,
    varying_settings,
)
from gns_pretrain.system.files import parse
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.wandb import about
from gns_pretrain.training.bad_steps import BadSteps
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_writer import TRAIN_STATE
from gns_pretrain.training.initialize import Source, begin_from
from gns_pretrain.training.loop import Run, apply_decision
from gns_pretrain.training.schedule import Schedule
from gns_pretrain.training.workload import Workload
from gns_pretrain.workloads import open_workload


def build_run(
    config: Config,
    world: World,
    directory: Path,
    *,
    run_id: str = "",
    source: Source | None = None,
) -> Run:
    """Build what a run needs, on every rank, at its first step or from its last checkpoint.

    Args:
        run_id: its id at a tracking service, needed on the main rank where one is used.
        source: what it begins from, where it has no checkpoint yet.
    """
    torch.manual_seed(config.seed)
    workload = open_workload(dataclasses.replace(config, data=staged(config.data)))
    model = workload.build_model(world)
    optimizer = build_optimizer(config, workload, model)
    adaptive = build_adaptive_batch_size(config, workload, num_ranks=world.num_data_ranks)

    def on_save(step: int) -> None:
        note_checkpoint(directory, step)
        record.message(f"step {step:,}: checkpoint written")

    checkpoints = Checkpoints(
        config.checkpoint.folder(directory),
        keep=config.checkpoint.keep,
        world=world,
        beside=beside_training(world, config.parallel) if config.checkpoint.asynchronous else None,
        on_save=on_save,
    )
    saved, damaged = checkpoints.load_latest(model, optimizer)
    resumed = saved is not None
    if saved is None and source:
        saved = begin_from(source, config.initial, model, optimizer, world)
        if saved and config.batch_size.policy == "constant":
            saved |= {"batch_size": config.batch_size.initial, "lr_multiplier": 1.0}
    if saved is not None:
        origin = source.folder if source and not resumed else checkpoints.directory
        check_state(saved, origin, seed=config.seed if resumed else None)
    forced = adaptive.load_state_dict(saved) if saved else None
    bad_steps = BadSteps(config.bad_steps, world) if config.bad_steps.skip else None
    if bad_steps and saved and "bad_steps" in saved:
        bad_steps.load_state_dict(saved["bad_steps"])
    settings = dataclasses.asdict(config)
    parameters = sum(p.numel() for p in model.parameters())
    with errors_of_main(world):
        record = Record(
            directory,
            config.metrics,
            is_main=world.is_main,
            resume_step=adaptive.steps if resumed else 0,
            config=settings | about(num_ranks=world.num_ranks, parameters=parameters),
            budget=workload.budget,
            unit=workload.unit,
            run_id=run_id,
            hparams=deciding_settings(flatten(settings), Purpose.CURVE)
            | {"seed": config.seed, "num_ranks": world.num_ranks, "parameters": parameters},
        )
    if saved and source and not (resumed or forced):
        update_half_life(optimizer, adaptive.batch_size, lr_multiplier=adaptive.lr_multiplier)
    for line in damaged:
        record.message(f"{line}; the one before it is used")
    if resumed:
        count = f"{workload.unit.of(adaptive.samples):,} {workload.unit.noun}"
        record.message(f"resumed from step {adaptive.steps:,}, {count}")
    elif source:
        begins = f"goes on from step {adaptive.steps:,}" if saved else "begins with the weights"
        record.message(f"{begins} of {source.folder}")
        with errors_of_main(world):
            changed = changes_since(source, settings) if world.is_main else []
        if changed:
            record.message(f"its settings, where this run's are others: {', '.join(changed)}")
    if forced:
        apply_decision(forced, adaptive.steps + 1, optimizer, record)
    for prefix, policy in config.batch_size.policies:
        if (note := policy.kind.note(policy)) is not None:
            record.message(f"{prefix}.{note}")

    workload.begin(world)
    meter = None
    if config.noise_scale.geometries:
        meter = NoiseMeter(
            model, config.noise_scale, kinds=workload.parameter_kinds, optimizer=optimizer
        )
    if meter and saved:
        meter.load_state_dict(saved)
    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(config, workload),
        workload=workload,
        adaptive=adaptive,
        checkpoints=checkpoints,
        record=record,
        meter=meter,
        bad_steps=bad_steps,
        seed=config.seed,
        gradient_clip=config.gradient_clip,
        checkpoint=config.checkpoint,
        metrics=config.metrics,
        peak_speed=workload.peak_speed(world),
    )


def decay_timescale(config: Config, workload: Workload) -> float | None:
    """That of the weight decay, as a fraction of the run; InputError where it cannot be."""
    steps = workload.total_samples / config.batch_size.initial
    return config.optimizer.timescale(
        steps=steps, tokens_per_parameter=lambda: workload.tokens_per_parameter
    )


def build_optimizer(config: Config, workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer, with what of it follows the batch size."""
    settings, batch_size = config.optimizer, config.batch_size.initial
    timescale = decay_timescale(config, workload)
    decaying = settings if timescale is None else settings.decaying()
    width = workload.model.relative_width
    optimizer = config.averaging.build(decaying, model, width=width)
    remember_peaks(optimizer)
    tied: tuple[str, ...] = TIED if settings.tie_to_tokens else ()
    if timescale is not None:
        set_timescale(optimizer, timescale, steps=workload.total_samples / batch_size)
        tied = tied or ("weight_decay",)  # its timescale is one in tokens
    if tied:
        keep_token_half_life(optimizer, batch_size, tied=tied, beta2=settings.tied_beta2)
    return optimizer


def changes_since(source: Source, settings: dict[str, Any]) -> list[str]:
    """What a run sets otherwise than the one that it begins from, as `lr 0.1 (here 0.2)`.

    Names, length and data aside; nothing where the source's run is not known.
    """
    run = source.folder.parents[1]
    if source.is_hf or not (run / CONFIG).is_file():
        return []
    theirs, ours = settings_of_run(run), identifying_settings(settings, "")
    return [
        f"{name} {theirs.get(name)} (here {ours.get(name)})"
        for name in varying_settings([theirs, ours], Purpose.RECORD)
        if name not in ("token_budget", "init.from", "init.what", FINGERPRINT)
    ]


def check_state(saved: dict[str, Any], origin: Path, *, seed: int | None) -> None:
    """Raise InputError if what a checkpoint says of its run is damaged, or another run's.

    Args:
        origin: where it was found.
        seed: of the run that goes on; None for a branch, which may have another.
    """
    hint = f"restore the {TRAIN_STATE} of its newest checkpoint, or use an older one"
    parse(SavedState, saved, source=origin, hint=hint)
    if seed is not None and saved.get("seed", seed) != seed:
        raise InputError(
            f"{origin} holds a checkpoint of seed={saved['seed']}, of another run than this one of "
            f"seed={seed}; restore its own, or restart with resume=never",
            on_all_ranks=True,
        )


def build_schedule(config: Config, workload: Workload) -> Schedule:
    """Build what the learning rate follows."""
    settings, final_lr = config.schedule, config.schedule.final_lr
    if final_lr is not None:
        final_fraction = min(final_lr / config.optimizer.lr, 1.0)
        settings = dataclasses.replace(settings, final_fraction=final_fraction)
    return Schedule(
        settings,
        initial_batch_size=config.batch_size.initial,
        total_steps=workload.steps_at(config.batch_size.initial),
    )


def build_adaptive_batch_size(
    config: Config, workload: Workload, *, num_ranks: int
) -> AdaptiveBatchSize:
    """Build what chooses the batch size: the policy that is followed, and the shadows."""
    return AdaptiveBatchSize(
        config.batch_size,
        batch_size=config.batch_size.initial,
        num_ranks=num_ranks,
        total_samples=workload.total_samples,
        tokens_per_sample=workload.unit.per_sample,
        lr_decay=build_schedule(config, workload).decay,
        shadows=config.batch_size.shadows,
        smoothing=config.noise_scale.smoothing,
        **config.micro_batches,
    )
