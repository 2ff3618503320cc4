"""Whether memory grows while a run trains, measures and enlarges its batch."""

import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import write_random_tokens
from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.schema import Config
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.launch.build import build_run
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.loop import train

SEQUENCE_LENGTH = 32
FIRST_BATCH, LARGEST_BATCH, MICRO_BATCH = 16, 32, 2
MEASURES_EVERY = 10
MIB = 2**20


class MemoryWatch:
    """Records memory after each step of a run, as its `should_stop`, and stops it in the end.

    Args:
        steps: after which the run is to stop.
        device: whose memory is noted too, if it is a GPU.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.device = device
        self.resident: list[int] = []  # bytes after each step
        self.allocated: list[int] = []  # on the GPU

    def __call__(self) -> bool:
        """Record memory; return whether the run has taken its steps."""
        self.resident.append(resident_bytes())
        if self.device.type == "cuda":
            self.allocated.append(torch.cuda.memory_allocated(self.device))
        return len(self.resident) >= self.steps


def measure_memory(model: LlamaConfig, *, steps: int, device: torch.device) -> dict[str, Any]:
    """Train with an adaptive batch and a measurement every 10 steps, and note memory.

    Args:
        model: with a vocabulary.
        steps: at least 10.
        device: where.

    Returns:
        One row; `growth_mib` is that of the last two fifths of the steps, when the batch has
        stopped growing, and `growth_mib_after_warm_up` that of the last three.
    """
    watch = MemoryWatch(steps, device)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as silence:
        data = Path(folder) / "data"
        data.mkdir()
        write_random_tokens(data, model.known_vocab_size, {"train": 2**17, "validation": 2**10})
        config = run_settings(model, Path(folder), data, steps)
        with redirect_stdout(silence), joined(RankInfo(), ParallelSettings(), device) as world:
            last_batch = trained(config, world, Path(folder) / "run", watch)
    return {
        "measured": "memory",
        "model": model.name,
        "steps": steps,
        "batch_size": [FIRST_BATCH, last_batch],
        "resident_mib": round(watch.resident[-1] / MIB, 1),
        "largest_resident_mib": round(max(watch.resident) / MIB, 1),
        **growth("", watch.resident),
        **(growth("gpu_", watch.allocated) if watch.allocated else {}),
    }


def trained(config: Config, world: World, directory: Path, watch: MemoryWatch) -> int:
    """Run until the watch stops it; the last batch size."""
    run = build_run(config, world, directory)
    try:
        train(run, watch)
    finally:
        run.batches.close()
        run.record.close()
    return run.state.batch_size


def growth(prefix: str, noted: Sequence[int]) -> dict[str, float]:
    """From the third to the last fifth of the steps, and from the second, in MiB.

    A fifth is its median step: measured steps take some MiB more for as long as they last.
    """
    steps = len(noted)
    fifths = [statistics.median(noted[k * steps // 5 : (k + 1) * steps // 5]) for k in range(5)]
    return {
        f"{prefix}growth_mib": round((fifths[4] - fifths[2]) / MIB, 2),
        f"{prefix}growth_mib_after_warm_up": round((fifths[4] - fifths[1]) / MIB, 2),
    }


def run_settings(model: LlamaConfig, folder: Path, data: Path, steps: int) -> Config:
    """A run that its watch ends, with everything on that keeps state between steps."""
    budget = steps * LARGEST_BATCH * SEQUENCE_LENGTH
    return Config(
        run_name="memory",
        output_directory=str(folder),
        token_budget=budget,
        micro_batch_size=MICRO_BATCH,
        model=model,
        data=DataSettings(path=str(data), sequence_length=SEQUENCE_LENGTH),
        optimizer=AdamWSettings(lr=1e-3),
        noise_scale=NoiseScaleSettings(["manhattan", "nuclear"], every_steps=MEASURES_EVERY),
        batch_size=BatchSizeSettings(policy="adaptive", initial=FIRST_BATCH, cap=LARGEST_BATCH),
        evaluation=EvaluationSettings(every_tokens=budget // 4, num_sequences=8),
        checkpoint=CheckpointSettings(every_steps=max(steps // 4, 10), keep=1),
        metrics=MetricsSettings(progress="never"),
    )


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; where the system does not tell, its largest."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
