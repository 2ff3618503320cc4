"""How long training waits for a checkpoint, and a restart for loading it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.harness import Row, StepCommand, synchronize, this_process
from gns_pretrain.training.checkpoint import checkpoint_folders


@dataclass
class Checkpoint(StepCommand):
    """One checkpoint of a run with AdamW: saved, then loaded, in the folder for temporary files."""

    def run(self) -> Iterator[Row]:
        """Yield one row; the file system's cache is as the save has left it when it is loaded."""
        world = this_process()
        with self.workload(world, "adamw") as work:
            run = work.run
            work.step()
            synchronize(world)
            began = time.perf_counter()
            run.checkpoints.save(run.model, run.optimizer, run.adaptive.state_dict())
            saved = time.perf_counter()
            run.checkpoints.load_latest(run.model, run.optimizer)
            synchronize(world)
            loaded = time.perf_counter()
            (folder,) = checkpoint_folders(run.checkpoints.directory)
            size = sum(path.stat().st_size for path in folder.iterdir())
        yield {
            "measured": "checkpoint",
            **self.described("adamw"),
            "gib": round(size / 2**30, 3),
            "save_seconds": round(saved - began, 2),
            "load_seconds": round(loaded - saved, 2),
        }
