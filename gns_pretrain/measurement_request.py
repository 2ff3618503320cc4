"""What scripts/measure_noise.py is asked for, and whether a batch can be split as it says."""

from dataclasses import dataclass, field
from pathlib import Path

from gns_pretrain.data.tokens import TokenSplit
from gns_pretrain.errors import InputError


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


def check_length(request: MeasurementRequest, split: TokenSplit) -> None:
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
