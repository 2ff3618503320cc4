"""How long training waits for a checkpoint, and a restart for loading it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated

from benchmarks.harness import Row, StepCommand, synchronize, this_process
from gns_pretrain.fields import About, at_least
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import checkpoint_folders


@dataclass
class Checkpoint(StepCommand):
    """Checkpoints of a run with AdamW, saved before training goes on and beside it, then loaded."""

    saves: Annotated[int, at_least(1), About("saves of each kind, after a first one")] = 2

    def run(self) -> Iterator[Row]:
        """Yield one row, of medians.

        `save_seconds` is how long training waits where `checkpoint.asynchronous=false`, and
        `stall_seconds` where it is true; a first save also allocates the copy in host memory. The
        file system's cache is as the last save has left it when that is loaded.
        """
        world = this_process()
        with self.workload(world, "adamw") as work:
            run = work.run
            before = Checkpoints(run.checkpoints.directory, keep=1, world=world)
            work.step()
            steps = iter(range(1, 3 + 2 * self.saves))  # each checkpoint is another step's

            def save(checkpoints: Checkpoints) -> None:
                state = run.adaptive.state_dict() | {"step": next(steps)}
                checkpoints.save(run.model, run.optimizer, state)

            def seconds_of(action: Callable[[], object]) -> float:
                synchronize(world)
                began = time.perf_counter()
                action()
                synchronize(world)
                return time.perf_counter() - began

            rounds = [
                {
                    "save_seconds": seconds_of(lambda: save(before)),
                    "step_seconds": seconds_of(work.step),
                    "stall_seconds": seconds_of(lambda: save(run.checkpoints)),
                    "step_seconds_while_saving": seconds_of(work.step),
                    "rest_of_save_seconds": seconds_of(run.checkpoints.wait),
                }
                for _ in range(1 + self.saves)
            ]
            loading = seconds_of(lambda: run.checkpoints.load_latest(run.model, run.optimizer))
            folder = checkpoint_folders(run.checkpoints.directory)[0]
            size = sum(path.stat().st_size for path in folder.iterdir())
        yield {
            "measured": "checkpoint",
            **self.described("adamw"),
            "gib": round(size / 2**30, 3),
            **{name: round(median(one[name] for one in rounds[1:]), 2) for name in rounds[0]},
            "first_stall_seconds": round(rounds[0]["stall_seconds"], 2),
            "load_seconds": round(loading, 2),
        }
