"""From settings to the objects of a run."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gns_pretrain.batch_size import AdaptiveBatchSize
from gns_pretrain.batch_size.controller import SavedState
from gns_pretrain.config.schema import Config
from gns_pretrain.data.batches import Batches, read_in_order
from gns_pretrain.data.mixture import Mixture
from gns_pretrain.data.settings import open_splits
from gns_pretrain.data.staging import staged
from gns_pretrain.errors import InputError
from gns_pretrain.model.flops import flops_per_token, peak_flops
from gns_pretrain.model.llama import Llama, parameter_kind
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.optim.base import keep_token_half_life, remember_peaks, update_half_life
from gns_pretrain.parallel.collectives import errors_of_main
from gns_pretrain.parallel.mesh import World, beside_training
from gns_pretrain.parallel.sharding import parallelize
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
from gns_pretrain.training.evaluate import ValidationSet
from gns_pretrain.training.initialize import Source, begin_from
from gns_pretrain.training.loop import Run, apply_decision
from gns_pretrain.training.schedule import Schedule


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
    training, validation = open_splits(staged(config.data))
    model = build_model(
        config,
        world,
        data_vocab_size=training.vocab_size,
        document_ids=training.document_ids if config.data.document_mask else None,
    )
    optimizer = config.optimizer.build(model)
    remember_peaks(optimizer)
    if config.optimizer.tie_to_tokens:
        keep_token_half_life(optimizer, config.batch_size.initial)
    adaptive = build_adaptive_batch_size(config, num_ranks=world.num_data_ranks)

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
            token_budget=config.token_budget,
            run_id=run_id,
            hparams=deciding_settings(flatten(settings), Purpose.CURVE)
            | {"seed": config.seed, "num_ranks": world.num_ranks, "parameters": parameters},
        )
    if saved and source and not (resumed or forced):
        update_half_life(optimizer, adaptive.batch_size, lr_multiplier=adaptive.lr_multiplier)
    for line in damaged:
        record.message(f"{line}; the one before it is used")
    if resumed:
        record.message(f"resumed from step {adaptive.steps:,}, {adaptive.tokens:,} tokens")
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

    sequence_length = config.data.sequence_length
    batches = Batches(
        training,
        sequence_length=sequence_length,
        seed=config.seed,
        device=world.device,
        rank=world.data_rank,
        num_ranks=world.num_data_ranks,
    )
    noise_scale = config.noise_scale
    meter = NoiseMeter(model, noise_scale, kinds=parameter_kind) if noise_scale.geometries else None
    if meter and saved:
        meter.load_state_dict(saved)
    return Run(
        world=world,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(config),
        batches=batches,
        validation_sets=build_validation_sets(config, validation, world),
        adaptive=adaptive,
        checkpoints=checkpoints,
        record=record,
        meter=meter,
        bad_steps=bad_steps,
        seed=config.seed,
        token_budget=config.token_budget,
        sequence_length=sequence_length,
        gradient_clip=config.gradient_clip,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        metrics=config.metrics,
        peak_tokens_per_second=peak_tokens_per_second(config, world, training.vocab_size),
    )


def build_validation_sets(config: Config, validation: Mixture, world: World) -> list[ValidationSet]:
    """Read the first validation sequences of each source, as many as its weight gives it."""
    counts = validation.counts(config.evaluation.num_sequences)
    length = config.data.sequence_length
    return [
        ValidationSet(
            source.name, weight, read_in_order(source.tokens, length, 0, count).to(world.device)
        )
        for source, weight, count in zip(
            validation.sources, validation.weights, counts, strict=True
        )
    ]


def peak_tokens_per_second(config: Config, world: World, data_vocab_size: int) -> float | None:
    """Tokens/s of all ranks at the bfloat16 peak of their GPUs; None where that is not known."""
    if world.device.type != "cuda" or config.dtype_on("cuda") != "bfloat16":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    shape = config.model.of_data(data_vocab_size)
    return peak and world.num_ranks * peak / flops_per_token(shape, config.data.sequence_length)


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


def build_model(
    config: Config,
    world: World,
    *,
    data_vocab_size: int,
    document_ids: dict[str, int | None] | None = None,
) -> torch.nn.Module:
    """Build the model with its first weights, compiled where asked, and parallelize it.

    Args:
        document_ids: bos_id and eos_id of the data, if documents are not to see each other.
    """
    with world.device:
        model = Llama(config.model.of_data(data_vocab_size))
    model.init_weights(config.seed)
    if document_ids is not None:
        model.separate_documents(**document_ids)
    on_gpu = world.device.type == "cuda"
    if config.compile == "always" or (config.compile == "auto" and on_gpu):
        model.compile_blocks()
    dtype = getattr(torch, config.dtype_on(world.device.type))
    return parallelize(model, world, compute_dtype=dtype)


def build_schedule(config: Config) -> Schedule:
    """Build what the learning rate follows."""
    return Schedule(
        config.schedule,
        initial_batch_size=config.batch_size.initial,
        total_steps=config.initial_total_steps,
    )


def build_adaptive_batch_size(config: Config, *, num_ranks: int) -> AdaptiveBatchSize:
    """Build what chooses the batch size: the policy that is followed, and the shadows."""
    return AdaptiveBatchSize(
        config.batch_size,
        batch_size=config.batch_size.initial,
        num_ranks=num_ranks,
        total_samples=config.total_samples,
        tokens_per_sample=config.data.sequence_length,
        lr_decay=build_schedule(config).decay,
        shadows=config.batch_size.shadows,
        smoothing=config.noise_scale.smoothing,
        **config.micro_batches,
    )
