"""What the benchmarks share: options of subcommands, workload, stopwatch and provenance."""

import gc
import itertools
import os
import platform
import re
import shlex
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.register import CONFIG_FOLDER
from gns_pretrain.config.schema import Config
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.data.shards import CorpusMeta, token_dtype, write_meta, write_shard
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, Settings, at_least, one_of
from gns_pretrain.launch.build import build_run
from gns_pretrain.launch.train import gpu_versions
from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.collectives import barrier
from gns_pretrain.parallel.mesh import World, pick_device
from gns_pretrain.runs.history import git_revision, package_versions
from gns_pretrain.system.processes import available_cores
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.loop import Run
from gns_pretrain.training.step import StepResult, train_step
from gns_pretrain.training.workload import MicroBatch

ROOT = Path(__file__).resolve().parents[1]
MODELS = {path.stem: path for path in sorted((CONFIG_FOLDER / "model").glob("*.yaml"))}
OPTIMIZERS: dict[str, OptimizerSettings] = {
    "adamw": AdamWSettings(lr=1e-4),
    "muon": MuonSettings(lr=1e-3),
    "signum": SignumSettings(lr=1e-5),
    "sgd": SGDSettings(lr=1e-3),
}
ON_GPU = torch.cuda.is_available()
WARM_UP_STEPS = 2
DISTINCT_STEPS = 4  # steps of random tokens on disk; later ones read them again

Row = dict[str, Any]
ModelName = Annotated[str, one_of(*MODELS), About("a file in conf/model")]
Pairs = Annotated[int, at_least(2), About("timed steps of each kind")]


class Command(Settings):
    """A subcommand: a dataclass whose fields are its options and whose docstring is its help."""

    section: ClassVar[str] = "--"

    def run(self) -> Iterable[Row]:
        """Measure; yield each row as soon as it is known."""
        raise NotImplementedError

    def options(self, *names: str) -> Row:
        return {name: getattr(self, name) for name in names}


def model_config(name: str, vocab_size: int) -> LlamaConfig:
    """Read a file of conf/model; `vocab_size` is for those that leave it to the data."""
    values: Any = OmegaConf.to_container(OmegaConf.load(MODELS[name]))
    del values["defaults"]
    scaling = RopeScaling(**values.pop("rope_scaling", {}))
    values["vocab_size"] = values.get("vocab_size") or vocab_size
    return LlamaConfig(**values, rope_scaling=scaling)


@dataclass
class ModelCommand(Command):
    """Options of a subcommand that builds a model."""

    model: ModelName = "tiny"
    vocab_size: Annotated[
        int, at_least(1), About("tokens, where the model leaves it to the data")
    ] = 4096

    def shape(self) -> LlamaConfig:
        return model_config(self.model, self.vocab_size)


@dataclass
class StepCommand(ModelCommand):
    """Options of a subcommand that trains whole steps on one process."""

    model: ModelName = "llama3_160m" if ON_GPU else "tiny"
    batch_size: Annotated[int, at_least(1), About("sequences of a step")] = 64 if ON_GPU else 16
    micro_batch_size: Annotated[int, at_least(1), About("sequences")] = 8 if ON_GPU else 2
    sequence_length: Annotated[int, at_least(1), About("tokens")] = 2048 if ON_GPU else 128
    compile: Annotated[bool, About("compile the blocks")] = ON_GPU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.micro_batch_size:
            raise InputError(
                f"--batch-size={self.batch_size} is not a multiple of --micro-batch-size="
                f"{self.micro_batch_size}; use one that is"
            )

    def workload(self, world: World, optimizer: str) -> AbstractContextManager["Workload"]:
        """Build the workload that the options describe, with one of OPTIMIZERS."""
        return workload(
            self.shape(),
            world,
            compile="always" if self.compile else "never",
            optimizer=OPTIMIZERS[optimizer],
            **self.options("batch_size", "micro_batch_size", "sequence_length"),
        )

    def described(self, optimizer: str) -> Row:
        """Return the entries of a row that say what a step computes."""
        return {
            "model": self.model,
            "vocab_size": self.shape().known_vocab_size,
            **self.options("sequence_length", "batch_size", "micro_batch_size"),
            "optimizer": optimizer,
            "compiled": self.compile,
        }


def this_process() -> World:
    """Return the world of a single process, on a GPU where torch sees one."""
    return World(rank=0, num_ranks=1, device=pick_device("auto", 0), kind="single")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of matmuls under precision=auto: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def write_random_tokens(folder: Path, vocab_size: int, splits: Mapping[str, int]) -> None:
    """Write token shards of random tokens; `splits` maps a split to its number of tokens."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    dtype = token_dtype(vocab_size)
    shards = tuple(
        write_shard(
            folder, split=name, index=0, tokens=generator.integers(0, vocab_size, count, dtype)
        )
        for name, count in splits.items()
    )
    write_meta(folder, CorpusMeta(dtype=dtype.name, vocab_size=vocab_size, shards=shards))


def llama_of(config: Config) -> LlamaConfig:
    """The model of a run on text."""
    assert isinstance(config.model, LlamaConfig)
    return config.model


def text_of(config: Config) -> DataSettings:
    """The data of a run on text."""
    assert isinstance(config.data, DataSettings)
    return config.data


class Workload:
    """The steps of a run, taken one by one: plain, or measured by a meter over its model."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.accumulation = run.adaptive.accumulation
        self.tokens = run.workload.unit.of(run.adaptive.batch_size)
        self._cursor = 0

    def meter(self, geometry: str, read_after_steps: int = 0) -> NoiseMeter:
        """Return a meter for `until_read`."""
        return NoiseMeter(
            self.run.model,
            geometries=[geometry],
            every_steps=read_after_steps + 1,
            read_after_steps=read_after_steps,
        )

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Return the next step's micro-batches."""
        adaptive, cursor = self.run.adaptive, self._cursor
        self._cursor += adaptive.batch_size
        return self.run.workload.micro_batches(
            cursor, batch_size=adaptive.batch_size, micro_batch_size=adaptive.micro_batch_size
        )

    def step(
        self,
        meter: NoiseMeter | None = None,
        micro_batches: Iterable[MicroBatch] | None = None,
        number: int | None = None,
    ) -> StepResult:
        """Take one training step, measured or not; by its number, if it has one."""
        return train_step(
            self.run.model,
            self.run.optimizer,
            self.micro_batches() if micro_batches is None else micro_batches,
            accumulation=self.accumulation,
            gradient_clip=self.run.gradient_clip,
            batch_size=self.run.adaptive.batch_size,
            meter=meter,
            step=number,
        )

    def until_read(self, meter: NoiseMeter) -> Callable[[], list[Reading]]:
        return until_read(lambda number: self.step(meter, number=number).readings, meter)


def until_read(
    step: Callable[[int], list[Reading]], meter: NoiseMeter
) -> Callable[[], list[Reading]]:
    """Return calls that each take a measured step and those up to its reading, which they return.

    Args:
        step: takes the step of a number; returns what was read in it.
        meter: whose `every_steps` is one above its `read_after_steps`.
    """
    every = meter.settings.every_steps
    numbers = itertools.count(every)
    return lambda: [step(next(numbers)) for _ in range(every)][-1]


def repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    """Return a call that takes `count` steps."""

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


@contextmanager
def workload(
    shape: LlamaConfig,
    world: World,
    *,
    batch_size: int,
    micro_batch_size: int,
    sequence_length: int,
    num_steps: int = DISTINCT_STEPS,
    policy: BatchSizeSettings | None = None,
    **sections: Any,
) -> Iterator[Workload]:
    """Build a run of train.py over random tokens; every rank of the world calls this.

    The budget is `num_steps` steps of `batch_size`, the policy constant unless given, and
    `sections` are other fields of `Config`.
    """
    tokens = num_steps * batch_size * sequence_length
    evaluation = sections.pop("evaluation", EvaluationSettings(num_sequences=1))
    gc.collect()  # cycles can hold a finished workload's memory
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        splits = {"train": tokens + 1, "validation": evaluation.num_sequences * sequence_length + 1}
        write_random_tokens(data, shape.known_vocab_size, splits)
        config = Config(
            run_name="run",
            output_directory=folder,
            token_budget=tokens,
            micro_batch_size=micro_batch_size,
            model=shape,
            data=DataSettings(path=str(data), sequence_length=sequence_length),
            batch_size=policy or BatchSizeSettings(initial=batch_size),
            evaluation=evaluation,
            metrics=MetricsSettings(progress="never"),
            **{"optimizer": OPTIMIZERS["adamw"]} | sections,
        )
        run = build_run(config, world, Path(folder) / "run")
        try:
            yield Workload(run)
        finally:
            run.checkpoints.close()
            run.workload.close()
            run.record.close()


class Timings(NamedTuple):
    """Seconds of each step; entry i of all lists is from the i-th pair."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quartiles(self, above: str, below: str) -> list[float]:
        """Return those of the ratio above / below, pair by pair: a busy machine slows both."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.quantiles([a / b for a, b in pairs], n=4)

    def ratio(self, name: str, above: str, below: str) -> Row:
        """Return the median ratio as `name`, and its quartiles."""
        low, middle, high = self.quartiles(above, below)
        return {name: round(middle, 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}

    def cost(self, measured: str, plain: str, *, steps: int = 1) -> Row:
        """Return the extra time of a measurement in per cent of a step, and its share at F = 100.

        Args:
            steps: that are timed together.
        """
        low, middle, high = (100 * steps * (q - 1) for q in self.quartiles(measured, plain))
        return {
            "extra_seconds": round(self.median(measured) - self.median(plain), 5),
            "cost_every_step_percent": round(middle, 2),
            "quartiles_percent": [round(low, 2), round(high, 2)],
            "cost_every_100_steps_percent": round(middle / 100, 4),
        }


def paired(
    steps: Mapping[str, Callable[[], Any]],
    pairs: int,
    world: World,
    *,
    warm_up: int = WARM_UP_STEPS,
) -> Timings:
    """Time steps alternating in one process, after untimed calls; which goes first alternates too.

    The device and the other ranks are waited for before and after each step.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(pairs):
        for name in order:
            synchronize(world)
            began = time.perf_counter()
            steps[name]()
            synchronize(world)
            seconds[name].append(time.perf_counter() - began)
        order.reverse()
    return Timings(seconds)


def synchronize(world: World) -> None:
    """Wait for the device and for the other ranks."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    barrier(world)


def host_synchronisations(step: Callable[[], Any]) -> int:
    """Count how often the host waits for the GPU during a step; 0 without one."""
    if not ON_GPU:
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def provenance(words: Sequence[str]) -> Row:
    """Return where, when and with which versions a row was measured, by `words` of a command."""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = shlex.join(["python", "scripts/benchmark.py", *words])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"OMP_NUM_THREADS={threads} {command}" if threads else command,
        "machine": {
            "processor": processor(),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            **package_versions("numpy", "tokenizers", "transformers", "triton"),
            **gpu_versions(),
            "code": git_revision(),
        },
    }


def processor() -> str:
    """Return the processor's name, which Python itself does not know on Linux."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
