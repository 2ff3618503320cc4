"""Measure noise and signal of a checkpoint: behind `gns-pretrain measure-noise`.

The first N sequences of the validation split, in file order, are one batch; its samples are
micro-batches of equal size. Anyone can compute the same numbers from the same tokens.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from gns_pretrain.data.batches import inputs_and_targets, read_in_order
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError, counted
from gns_pretrain.fields import About, Settings, at_least, key_of, one_of, path_name
from gns_pretrain.geometry.square_root import MODES
from gns_pretrain.launch.ranks import rank_info_from
from gns_pretrain.noise_scale.geometries import GEOMETRIES, Measurement
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.sample_sums import SampleSums
from gns_pretrain.noise_scale.settings import NUCLEAR_PARAMETERS, PARAMETERS, NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined, pick_device
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import accumulate_gradients
from gns_pretrain.training.trained_model import TrainedModel
from gns_pretrain.training.workload import MicroBatch

# Geometries that need no optimizer, which is not loaded here.
OF_WEIGHTS = {name: kind for name, kind in GEOMETRIES.items() if not kind.reads_optimizer}


@dataclass
class MeasurementRequest(Settings):
    """The options of `gns-pretrain measure-noise`."""

    section: ClassVar[str] = "--"

    checkpoint: Annotated[
        str | Path,
        path_name(),
        About("a run directory, a step_* folder or its URL, or a Hugging Face Llama folder"),
    ]
    data: Annotated[
        Path, path_name(), About("token-shard folder with a validation split, or embedded")
    ]
    num_sequences: Annotated[int, at_least(1), About("the batch, in sequences")]
    micro_batch_size: Annotated[int, at_least(1), About("sequences of a sample")]
    sequence_length: Annotated[
        int | None,
        at_least(1),
        About("tokens of a sequence (default: the run's; of a Hugging Face model 2048 at most)"),
    ] = None
    geometry: Annotated[list[str], key_of(OF_WEIGHTS), About("default: all three")] = field(
        default_factory=lambda: list(OF_WEIGHTS)
    )
    estimate: Annotated[
        list[str], one_of("plug_in", "debiased", "cross_fitted"), About("default: plug_in")
    ] = field(default_factory=lambda: ["plug_in"])
    parameters: Annotated[
        str, one_of(*PARAMETERS), About("weights that Euclidean and Manhattan measure")
    ] = "all"
    nuclear_parameters: Annotated[
        str, one_of(*NUCLEAR_PARAMETERS), About("weights that Nuclear measures")
    ] = "block_matrices"
    square_root: Annotated[str, one_of(*MODES), About("how tr C^(1/2) is taken")] = "auto"
    interval: Annotated[
        bool, About("standard errors by a jackknife: every gradient is taken twice")
    ] = True
    device: Annotated[
        str, one_of("auto", "cpu", "cuda"), About("auto takes a GPU where there is one")
    ] = "auto"

    def rounds(self, num_ranks: int) -> int:
        """Split the batch; return the number of micro-batches per rank, all of the same size."""
        unit = self.micro_batch_size * num_ranks
        if self.num_sequences % unit:
            raise InputError(
                f"--num-sequences={self.num_sequences} cannot be split into samples of "
                f"--micro-batch-size={self.micro_batch_size} on {counted(num_ranks, 'rank')}; "
                f"use a multiple of {unit}"
            )
        if self.num_sequences == self.micro_batch_size:
            raise InputError(
                f"--num-sequences={self.num_sequences} makes one sample of --micro-batch-size="
                f"{self.micro_batch_size}, and noise is the difference of at least two; "
                f"use at least {2 * unit}"
            )
        return self.num_sequences // unit

    def missing_intervals(self, num_ranks: int) -> list[str]:
        """Explain why an interval that was asked for cannot be given, in a line each."""
        unit, rounds = self.micro_batch_size * num_ranks, self.rounds(num_ranks)
        if self.interval and rounds < 3:
            return [
                "no standard error: it leaves out one micro-batch of each rank at a time and needs "
                f"3 per rank, of which there are {rounds}; use --num-sequences={3 * unit} or more"
            ]
        if self.interval and (num_ranks, rounds) == (1, 3) and "cross_fitted" in self.estimate:
            # Of samples 0, 1 and 2 only one is odd: without it half B is empty.
            return [
                "no standard error for cross_fitted: each half of the batch needs 2 micro-batches; "
                f"use --num-sequences={4 * unit} or more"
            ]
        return []


@dataclass(frozen=True)
class Report:
    """The result of a measurement."""

    num_samples: int
    batch_size: int  # sequences
    # Each with the standard error of its noise scale, in sequences; None if unknown.
    estimated: list[tuple[Measurement, float | None]]
    notes: list[str] = field(
        default_factory=list
    )  # a line each: what is missing, or unlike training

    def as_dict(self) -> dict[str, Any]:
        """Convert for JSON: a geometry's first estimate by itself, others under their names."""
        values: dict[str, Any] = {"num_samples": self.num_samples, "batch_size": self.batch_size}
        for m, standard_error in self.estimated:
            numbers = {
                "noise": m.noise,
                "signal": m.signal,
                "noise_scale": m.noise_scale,
                "standard_error": standard_error,
            }
            if m.geometry in values:
                values[m.geometry][m.estimate] = numbers
            else:
                values[m.geometry] = {"estimate": m.estimate, **numbers}
        return values


def measure(request: MeasurementRequest) -> Report | None:
    """Measure on this process, or on all ranks that torchrun or srun has started.

    Returns:
        The report on the first rank, None on the others.

    Raises:
        InputError: a batch that cannot be split into equal samples, data and checkpoint that do not
            fit each other, or a checkpoint whose noise or signal is not finite.
    """
    settings = NoiseScaleSettings(
        geometries=request.geometry,
        estimates=request.estimate,
        parameters=request.parameters,
        nuclear_parameters=request.nuclear_parameters,
        square_root=request.square_root,
    )
    ranks = rank_info_from(os.environ) or RankInfo()
    rounds = request.rounds(ranks.num_ranks)
    trained = TrainedModel.find(request.checkpoint)
    length = request.sequence_length or trained.default_length
    tokens = TokenShards.open(trained.data_folder(str(request.data)), "validation")
    available = tokens.num_sequences(length)
    if request.num_sequences > available:
        raise InputError(
            f"--num-sequences={request.num_sequences} is more than the {available} validation "
            f"sequences of --sequence-length={length} in {request.data}; use at most {available}"
        )
    llama = trained.load()
    if llama.config.known_vocab_size < tokens.vocab_size:
        raise InputError(
            f"{request.checkpoint} has a vocabulary of {llama.config.known_vocab_size}, but "
            f"{request.data} holds {tokens.vocab_size} token ids; use the data it was trained on"
        )
    device = pick_device(request.device, ranks.local_rank)
    # Sample j goes to rank j % num_ranks, as in training.
    starts = [
        (index * ranks.num_ranks + ranks.rank) * request.micro_batch_size for index in range(rounds)
    ]
    with joined(ranks, ParallelSettings(), device) as world:
        model = parallelize(llama.to(device), world, compute_dtype=torch.float32)
        batch = [
            inputs_and_targets(
                read_in_order(tokens, length, start, start + request.micro_batch_size).to(device)
            )
            for start in starts
        ]
        estimated = estimate(model, NoiseMeter(model, settings), batch, request)
    if ranks.rank != 0:
        return None
    notes = request.missing_intervals(ranks.num_ranks)
    if trained.trained_length and length > trained.trained_length:
        notes.append(
            f"--sequence-length={length} goes beyond the {trained.trained_length} tokens that the "
            "model was trained on, so this is not the noise scale of its training"
        )
    return Report(rounds * ranks.num_ranks, request.num_sequences, estimated, notes)


def estimate(
    model: nn.Module, meter: NoiseMeter, batch: Sequence[MicroBatch], request: MeasurementRequest
) -> list[tuple[Measurement, float | None]]:
    """Take every geometry and estimate of the batch, with standard errors where asked for.

    Args:
        batch: this rank's micro-batches.
    """
    rounds = len(batch)
    with meter.measure():
        accumulate_gradients(model, batch, accumulation=rounds, meter=meter)
    whole = meter.sums().copied()
    model.zero_grad(set_to_none=True)
    readings = meter.readings_of(whole, request.num_sequences)
    for reason in filter(None, (reading.total.skip_reason for reading in readings)):
        raise InputError(
            f"{request.checkpoint} gives no noise scale: {reason}; its weights are not finite or "
            "too large for float32, use an earlier checkpoint"
        )
    errors: list[float | None] = [None] * len(readings)
    if request.interval and rounds > 2:
        errors = standard_errors(model, meter, whole, batch, request.num_sequences)
    return [(reading.total, error) for reading, error in zip(readings, errors, strict=True)]


def standard_errors(
    model: nn.Module,
    meter: NoiseMeter,
    whole: SampleSums,
    batch: Sequence[MicroBatch],
    num_sequences: int,
) -> list[float | None]:
    """Leave out one round at a time: one sample on one process, one of each rank on several.

    Returns:
        For each reading of the meter the standard error of its noise scale, in sequences; None
        where leaving out a round leaves no signal.
    """
    scales: list[list[float]] = []  # [round][reading]
    for index, micro_batch in enumerate(batch):
        with meter.measure(first_round=index):
            accumulate_gradients(model, [micro_batch], accumulation=1, meter=meter)
        left = whole.without(meter.sums())
        model.zero_grad(set_to_none=True)
        remaining = num_sequences * left.num_samples // whole.num_samples
        totals = [reading.total for reading in meter.readings_of(left, remaining)]
        scales.append([math.inf if t.noise_scale is None else t.noise_scale for t in totals])
    errors = (jackknife(column) for column in zip(*scales, strict=True))
    return [error if math.isfinite(error) else None for error in errors]


def jackknife(left_out: Sequence[float]) -> float:
    """Standard error of a statistic, in its unit (Efron and Stein 1981).

        se^2 = (R - 1) / R * sum_j (t_j - mean_j t_j)^2,    t_j the statistic without sample j

    For a mean it is exactly s / sqrt(R); for smooth statistics it is too large on average. Near a
    ratio's pole (a signal that could be zero) no such interval is meaningful.

    Args:
        left_out: t_j for each of the R samples; R should exceed what the statistic needs by 2.
    """
    mean = math.fsum(left_out) / len(left_out)
    squares = math.fsum((value - mean) ** 2 for value in left_out)
    return math.sqrt((len(left_out) - 1) / len(left_out) * squares)
