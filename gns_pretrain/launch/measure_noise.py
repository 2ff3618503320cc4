"""Noise and signal of a checkpoint, without training it: the work behind scripts/measure_noise.py.

The first N sequences of the validation split, in file order, are one batch; its samples are
micro-batches of equal size. Anyone can compute the same numbers from the same tokens.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.data.batches import read_in_order
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError
from gns_pretrain.launch.train import place_from
from gns_pretrain.model.huggingface import load_hf_folder
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.geometries import Measurement, SampleSums
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined, pick_device
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.checkpoint import load_model
from gns_pretrain.training.step import accumulate_gradients

# What scripts/measure_noise.py is asked for, and whether a batch can be split as it says.


@dataclass
class MeasurementRequest:
    """What `measure` is asked for; one field an option of the script."""

    checkpoint: Path  # a step_* folder of a run, or a Hugging Face Llama folder
    data: Path  # token shards with a split `validation`
    num_sequences: int  # N, the batch
    micro_batch_size: int  # sequences of a sample
    sequence_length: int = 2048  # tokens; the paper's
    geometries: list[str] = field(default_factory=lambda: ["euclidean", "manhattan", "nuclear"])
    estimates: list[str] = field(default_factory=lambda: ["plug_in"])
    parameters: str = "all"  # of Euclidean and Manhattan: all | block_matrices
    nuclear_parameters: str = "block_matrices"  # block_matrices | all_2d
    square_root: str = "auto"  # auto | iterative | exact
    interval: bool = True  # standard errors by a jackknife: every gradient is taken twice
    device: str = "auto"  # auto | cpu | cuda

    def __post_init__(self) -> None:
        """Check each number by itself."""
        for name in ("num_sequences", "micro_batch_size", "sequence_length"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name.replace('_', '-')}={value} must be at least 1")


def rounds_of(request: MeasurementRequest, num_ranks: int) -> int:
    """Micro-batches that each rank takes, all of the same size."""
    unit = request.micro_batch_size * num_ranks
    if request.num_sequences % unit:
        raise InputError(
            f"--num-sequences={request.num_sequences} cannot be split into samples of "
            f"--micro-batch-size={request.micro_batch_size} on {num_ranks} ranks; use a multiple "
            f"of {unit}"
        )
    if request.num_sequences // request.micro_batch_size < 2:
        raise InputError(
            f"--num-sequences={request.num_sequences} makes one sample of --micro-batch-size="
            f"{request.micro_batch_size}, and noise is the difference of at least two; "
            f"use at least {2 * unit}"
        )
    return request.num_sequences // unit


def check_length(request: MeasurementRequest, split: TokenShards) -> None:
    """Refuse a batch that is longer than the validation split."""
    available = split.num_sequences(request.sequence_length)
    if request.num_sequences > available:
        raise InputError(
            f"--num-sequences={request.num_sequences} is more than the {available} validation "
            f"sequences of --sequence-length={request.sequence_length} in {request.data}; "
            f"use at most {available}"
        )


def missing_intervals(request: MeasurementRequest, rounds: int, num_ranks: int) -> list[str]:
    """Why an interval that was asked for cannot be given; a line each."""
    if not request.interval:
        return []
    unit = request.micro_batch_size * num_ranks
    if rounds < 3:
        return [
            f"no standard error: it leaves out micro-batches in turn and needs 3 a rank, of which "
            f"there are {rounds}; use --num-sequences={3 * unit} or more"
        ]
    if num_ranks == 1 and rounds == 3 and "cross_fitted" in request.estimates:
        # Of samples 0, 1 and 2 only one is odd: without it half B is empty.
        return [
            "no standard error for cross_fitted: each half of the batch needs 2 micro-batches; "
            f"use --num-sequences={4 * unit} or more"
        ]
    return []


# How far a statistic of R samples is to be trusted, from leaving out one sample at a time.


def jackknife(statistic: Callable[[int | None], float], num_samples: int) -> tuple[float, float]:
    """A statistic and its standard error (Efron and Stein 1981).

        se^2 = (R - 1) / R * sum_j (t_j - mean_j t_j)^2,    t_j the statistic without sample j

    For a mean it is exactly s / sqrt(R); for smooth statistics it errs to the large side on
    average. Near a ratio's pole (a signal that could be zero) no such interval is meaningful.

    Args:
        statistic: called with a sample's index to leave out, and once with None for all samples.
        num_samples: R, at least 2 more samples than the statistic itself needs is wise.

    Returns:
        The statistic of all samples, and its standard error in the same unit.
    """
    left_out = [statistic(index) for index in range(num_samples)]
    mean = math.fsum(left_out) / num_samples
    squares = math.fsum((value - mean) ** 2 for value in left_out)
    return statistic(None), math.sqrt((num_samples - 1) / num_samples * squares)


@dataclass(frozen=True)
class Estimated:
    """A measurement and the standard error of its noise scale, in sequences; None if unknown."""

    measurement: Measurement
    standard_error: float | None


@dataclass(frozen=True)
class Report:
    """What was measured; None on all ranks but the first."""

    num_samples: int
    batch_size: int  # sequences
    estimated: list[Estimated]
    notes: list[str] = field(default_factory=list)  # a line for each interval that is not given

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a geometry's first estimate by itself, further ones under their names."""
        values: dict[str, Any] = {"num_samples": self.num_samples, "batch_size": self.batch_size}
        for entry in self.estimated:
            m = entry.measurement
            numbers = {
                "noise": m.noise,
                "signal": m.signal,
                "noise_scale": m.noise_scale,
                "standard_error": entry.standard_error,
            }
            if m.geometry in values:
                values[m.geometry][m.estimate] = numbers
            else:
                values[m.geometry] = {"estimate": m.estimate, **numbers}
        return values


def measure(request: MeasurementRequest) -> Report | None:
    """Measure on this process, or on all ranks that torchrun or srun has started.

    Raises:
        InputError: a batch that cannot be split into equal samples, data and checkpoint that do not
            fit each other, or a checkpoint whose noise or signal is not finite.
    """
    settings = NoiseScaleSettings(
        geometries=request.geometries,
        estimates=request.estimates,
        parameters=request.parameters,
        nuclear_parameters=request.nuclear_parameters,
        square_root=request.square_root,
    )
    place = place_from(os.environ) or RankInfo()
    rounds = rounds_of(request, place.num_ranks)
    split = TokenShards.open(request.data, "validation")
    check_length(request, split)
    model = load_any(request.checkpoint)
    if model.config.known_vocab_size < split.vocab_size:
        raise InputError(
            f"{request.checkpoint} has a vocabulary of {model.config.known_vocab_size}, but "
            f"{request.data} holds {split.vocab_size} token ids; use the data it was trained on"
        )
    device = pick_device(request.device, place.local_rank)
    with joined(place, ParallelSettings(), device) as world:
        laid = parallelize(model.to(device), world, compute_dtype=torch.float32)
        meter = NoiseMeter(laid, world, settings)
        estimated = estimate(laid, meter, split, request, rounds)
    if place.rank != 0:
        return None
    notes = missing_intervals(request, rounds, place.num_ranks)
    return Report(rounds * place.num_ranks, request.num_sequences, estimated, notes)


def load_any(checkpoint: Path) -> Llama:
    """The model of one of our checkpoints or of a Hugging Face folder."""
    if (checkpoint / "config.json").is_file():
        return load_hf_folder(checkpoint)
    return load_model(checkpoint)


def estimate(
    model: nn.Module,
    meter: NoiseMeter,
    split: TokenShards,
    request: MeasurementRequest,
    rounds: int,
) -> list[Estimated]:
    """Every geometry and estimate over the whole batch, with standard errors where asked for."""
    world = meter.world
    with meter.tap.armed(rounds):
        batch = list(samples_of(split, request, rounds, world))
        accumulate_gradients(model, batch, accumulation=rounds, tap=meter.tap)
    whole = meter.tap.sums().copied()
    model.zero_grad(set_to_none=True)
    readings = meter.readings_of(whole, request.num_sequences)
    check_finite(readings, request)
    errors: list[float | None] = [None] * len(readings)
    if request.interval and rounds > 2:
        errors = standard_errors(model, meter, whole, batch, request, readings)
    return [
        Estimated(reading.total, error) for reading, error in zip(readings, errors, strict=True)
    ]


def check_finite(readings: list[Reading], request: MeasurementRequest) -> None:
    """Refuse to report what no noise scale follows from."""
    for reason in filter(None, (reading.total.skip_reason for reading in readings)):
        raise InputError(
            f"{request.checkpoint} gives no noise scale: {reason}; its weights are not finite or "
            "too large for float32, use an earlier checkpoint"
        )


def samples_of(
    split: TokenShards, request: MeasurementRequest, rounds: int, world: World
) -> Iterator[Tensor]:
    """This rank's micro-batches: sample j goes to rank j % num_ranks, as in training."""
    for index in range(rounds):
        start = (index * world.num_ranks + world.rank) * request.micro_batch_size
        stop = start + request.micro_batch_size
        yield read_in_order(split, request.sequence_length, start, stop).to(world.device)


def standard_errors(
    model: nn.Module,
    meter: NoiseMeter,
    whole: SampleSums,
    batch: list[Tensor],
    request: MeasurementRequest,
    readings: list[Reading],
) -> list[float | None]:
    """Jackknife over rounds: one sample at a time on one process, one a rank on several."""
    scales: list[list[float]] = []  # [round][reading]
    for index, sequences in enumerate(batch):
        with meter.tap.armed(1, first_round=index):
            accumulate_gradients(model, [sequences], accumulation=1, tap=meter.tap)
        left = whole.without(meter.tap.sums())
        model.zero_grad(set_to_none=True)
        remaining = request.num_sequences * left.num_samples // whole.num_samples
        scales.append([scale_of(r) for r in meter.readings_of(left, remaining)])
    errors: list[float | None] = []
    for column, reading in enumerate(readings):

        def statistic(
            left_out: int | None, column: int = column, reading: Reading = reading
        ) -> float:
            return scale_of(reading) if left_out is None else scales[left_out][column]

        error = jackknife(statistic, len(batch))[1]
        errors.append(error if math.isfinite(error) else None)
    return errors


def scale_of(reading: Reading) -> float:
    """Noise scale of a reading; not finite where there is no signal."""
    scale = reading.total.noise_scale
    return math.inf if scale is None else scale
