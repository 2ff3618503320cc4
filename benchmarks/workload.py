"""A training step to be measured: model, optimizer, data and noise meters on this process."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gns_pretrain.data.batches import Batches
from gns_pretrain.data.shards import CorpusMeta, TokenShards, token_dtype, write_meta, write_shard
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import StepResult, train_step

OPTIMIZER_SETTINGS: dict[str, OptimizerSettings] = {
    "adamw": AdamWSettings(lr=1e-4),
    "muon": MuonSettings(lr=1e-3),
    "signum": SignumSettings(lr=1e-5),
    "sgd": SGDSettings(lr=1e-3),
}
PREPARED_STEPS = 4  # steps of random text on disk; later ones read it again


@dataclass(frozen=True)
class Workload:
    """What a step computes.

    Args:
        model: shape, with a vocabulary.
        sequence_length: tokens.
        batch_size: sequences of a step.
        micro_batch_size: sequences at once; a sample of the noise scale.
        optimizer: a key of `OPTIMIZER_SETTINGS`.
        compiled: compile the blocks.
    """

    model: LlamaConfig
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    optimizer: str = "adamw"
    compiled: bool = False

    def __post_init__(self) -> None:
        """Check what argparse cannot."""
        for name in ("sequence_length", "batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.micro_batch_size:
            raise InputError(
                f"batch_size={self.batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size}; use one that is"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.batch_size // self.micro_batch_size

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.sequence_length

    def described(self) -> dict[str, str | int | bool]:
        """Its entries of a row."""
        return {
            "model": self.model.name,
            "vocab_size": self.model.known_vocab_size,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "optimizer": self.optimizer,
            "compiled": self.compiled,
        }


class Training:
    """A workload's objects, as `python train.py` builds them on one process.

    Args:
        workload: what a step computes.
        device: float32 weights; computes in bfloat16 on a GPU.
        batches: its text.
        geometries: a meter for each, idle unless a step asks for it.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        batches: Batches,
        geometries: Sequence[str] = (),
    ) -> None:
        self.workload = workload
        self.device = device
        world = World(rank=0, num_ranks=1, device=device, kind="single")
        with device:
            llama = Llama(workload.model)
        llama.init_weights(seed=0)
        if workload.compiled:
            llama.compile_blocks()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model: nn.Module = parallelize(llama, world, compute_dtype=dtype)
        self.optimizer = OPTIMIZER_SETTINGS[workload.optimizer].build(self.model)
        self.meters = {
            geometry: NoiseMeter(self.model, world, NoiseScaleSettings([geometry]))
            for geometry in geometries
        }
        self._batches = batches
        self._cursor = 0

    def micro_batches(self) -> Iterator[Tensor]:
        """The next step's, as the loop gets them."""
        workload = self.workload
        cursor, self._cursor = self._cursor, self._cursor + workload.batch_size
        return self._batches.micro_batches(
            cursor,
            batch_size=workload.batch_size,
            micro_batch_size=workload.micro_batch_size,
        )

    def step(
        self, geometry: str | None = None, micro_batches: Iterator[Tensor] | None = None
    ) -> StepResult:
        """Train one step, measured in a geometry or not."""
        return train_step(
            self.model,
            self.optimizer,
            micro_batches or self.micro_batches(),
            accumulation=self.workload.accumulation,
            gradient_clip=1.0,
            batch_size=self.workload.batch_size,
            meter=self.meters[geometry] if geometry else None,
        )


@contextmanager
def training(
    workload: Workload, device: torch.device, geometries: Sequence[str] = ()
) -> Iterator[Training]:
    """Build a workload over random text; its files and threads end with the block."""
    length = workload.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        tokens = PREPARED_STEPS * workload.tokens + 1
        write_random_tokens(
            Path(folder), workload.model.known_vocab_size, {"train": max(tokens, 2 * length)}
        )
        split = TokenShards.open(Path(folder), "train")
        batches = Batches(split, sequence_length=length, seed=0, device=device)
        try:
            yield Training(workload, device, batches, geometries)
        finally:
            batches.close()


def write_random_tokens(folder: Path, vocab_size: int, splits: dict[str, int]) -> None:
    """Token shards of so many random tokens a split."""
    generator = np.random.default_rng(0)
    dtype = token_dtype(vocab_size)
    shards = tuple(
        write_shard(
            folder, split=name, index=0, tokens=generator.integers(0, vocab_size, count, dtype)
        )
        for name, count in splits.items()
    )
    write_meta(folder, CorpusMeta(dtype=dtype.name, vocab_size=vocab_size, shards=shards))
