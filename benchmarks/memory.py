"""Whether memory grows while a run trains, measures and enlarges its batch."""

import os
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.harness import ModelCommand, ModelName, Row, this_process, workload
from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.fields import About, at_least
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.loop import train

SEQUENCE_LENGTH = 32
FIRST_BATCH, LARGEST_BATCH, MICRO_BATCH = 16, 32, 2
MEASURES_EVERY = 10
MIB = 2**20


@dataclass
class Memory(ModelCommand):
    """Growth of memory with an adaptive batch and a measurement every 10 steps."""

    model: ModelName = "demo"
    steps: Annotated[int, at_least(10), About("optimizer steps")] = 1000

    def run(self) -> Iterator[Row]:
        """Yield one row.

        `growth_mib` is that of the last two fifths of the steps, when the batch has stopped
        growing, and `growth_mib_after_warm_up` that of the last three.
        """
        world, shape = this_process(), self.shape()
        budget = self.steps * LARGEST_BATCH * SEQUENCE_LENGTH  # more than the run takes
        resident: list[int] = []  # bytes after each step
        allocated: list[int] = []  # likewise, of the GPU

        def record_memory() -> bool:
            resident.append(resident_bytes())
            allocated.append(torch.cuda.memory_allocated())  # 0 without a GPU
            return len(resident) >= self.steps

        # Everything on that keeps state between steps.
        everything = workload(
            shape,
            world,
            batch_size=LARGEST_BATCH,
            micro_batch_size=MICRO_BATCH,
            sequence_length=SEQUENCE_LENGTH,
            num_steps=self.steps,
            policy=BatchSizeSettings(policy="adaptive", initial=FIRST_BATCH, cap=LARGEST_BATCH),
            noise_scale=NoiseScaleSettings(["manhattan", "nuclear"], every_steps=MEASURES_EVERY),
            evaluation=EvaluationSettings(every_tokens=budget // 4, num_sequences=8),
            checkpoint=CheckpointSettings(every_steps=max(self.steps // 4, 10), keep=1),
        )
        with Path(os.devnull).open("w") as silence, redirect_stdout(silence), everything as work:
            train(work.run, record_memory)
            last_batch = work.run.adaptive.batch_size
        yield {
            "measured": "memory",
            "model": shape.name,
            "steps": self.steps,
            "batch_size": [FIRST_BATCH, last_batch],
            "resident_mib": round(resident[-1] / MIB, 1),
            "largest_resident_mib": round(max(resident) / MIB, 1),
            **growth("", resident),
            **(growth("gpu_", allocated) if any(allocated) else {}),
        }


def growth(prefix: str, recorded: Sequence[int]) -> dict[str, float]:
    """Return the growth from the third to the last fifth of the steps, and from the second, in MiB.

    A fifth is its median step: measured steps take some MiB more for as long as they last.
    """
    steps = len(recorded)
    fifths = [statistics.median(recorded[k * steps // 5 : (k + 1) * steps // 5]) for k in range(5)]
    return {
        f"{prefix}growth_mib": round((fifths[4] - fifths[2]) / MIB, 2),
        f"{prefix}growth_mib_after_warm_up": round((fifths[4] - fifths[1]) / MIB, 2),
    }


def resident_bytes() -> int:
    """Return this process's memory in RAM now; outside Linux, the most it has been."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
