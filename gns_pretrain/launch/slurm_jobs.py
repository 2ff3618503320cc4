"""Which run was submitted as which SLURM job: a line a run in `logs/slurm/submitted.jsonl`."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.system.slurm import job_states

LOG_FOLDER = ("logs", "slurm")  # beside the runs, on a file system that all nodes share
SUBMITTED = "submitted.jsonl"
POLL_SECONDS = 5.0


def append_submitted(folder: Path, directories: Sequence[Path], jobs: Sequence[str]) -> None:
    """Record the job of each run directory: 12, or 12_3 in an array."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SUBMITTED).open("a") as file:
        for directory, job in zip(directories, jobs, strict=True):
            values = {"run_directory": str(directory), "job": job, "time": time.time()}
            file.write(json.dumps(values) + "\n")


def read_submitted(folder: Path) -> dict[Path, str]:
    """The last job of each run directory."""
    path = folder / SUBMITTED
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines]
    return {Path(each["run_directory"]): each["job"] for each in values}


def queued_runs(folder: Path, states: Mapping[str, str] | None) -> dict[Path, str]:
    """The submitted runs that SLURM's states show as pending or running, with their jobs.

    Raises:
        InputError: the states are not known, so that a run could be submitted twice.
    """
    if states is None:
        raise InputError(
            "squeue does not answer, so which runs are in the queue is not known and none was "
            "submitted; try again"
        )
    return {run: job for run, job in read_submitted(folder).items() if job in states}


def wait_for_jobs(jobs: Sequence[str], *, log: Callable[[str], None]) -> None:
    """Return when none of the jobs is pending or running; while SLURM is silent, keep waiting."""
    silent = False
    while (states := job_states()) is None or any(job in states for job in jobs):
        if states is None and not silent:
            log("squeue does not answer; waiting until it does")
        silent = states is None
        time.sleep(POLL_SECONDS)
