"""Runs of the small model as SLURM jobs, by slurm/train.sbatch as a user calls it."""

import sys
import time
from pathlib import Path

from gns_pretrain.tracking.jsonl import read_records
from tests.end_to_end.commands import ROOT, arguments
from tests.settings import without_times
from tests.slurm.cluster import Cluster

PATIENCE_SECONDS = 120
STEPS = 40
# The fake nodes are this machine under names that do not resolve.
ENVIRONMENT = {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def submit(
    cluster: Cluster,
    folder: Path,
    data: Path,
    *more: str,
    nodes: int = 1,
    tasks: int = 2,
    steps: int = STEPS,
    log: str = "log",
    node: str | None = None,
) -> str:
    """Submit the small run with `tasks` tasks and GPUs a node; returns the job's id."""
    return cluster.submit(
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={tasks}",
        "--cpus-per-task=1",
        f"--output={folder / log}",
        *([f"--nodelist={node}"] if node else []),
        "slurm/train.sbatch",
        *arguments(folder, data, "metrics.log_every=1", *more, steps=steps),
        cwd=ROOT,
        **(ENVIRONMENT | {"GNS_LOGS": str(folder / "jobs")}),
    )


def lines(folder: Path) -> list[dict]:
    """The run's record without its times."""
    return [without_times(record) for record in read_records(folder / "small" / "metrics.jsonl")]


def wait_for_step(folder: Path, step: int, name: str = "small") -> None:
    """Return once the training line of a step has been written."""
    metrics = folder / name / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (metrics.exists() and f'"kind":"train","step":{step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"step {step} did not come in {folder}"
        time.sleep(0.05)
