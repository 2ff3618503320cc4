"""Which run was submitted as which SLURM job: a line a run in `<logs>/submitted.jsonl`."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.slurm import job_states

SUBMITTED = "submitted.jsonl"
LOOK_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Submission:
    """A run and its job."""

    run_directory: Path  # absolute
    job: str  # 12, or 12_3 in an array


def note_submissions(folder: Path, submissions: Sequence[Submission]) -> None:
    """Write down what was submitted."""
    if not submissions:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SUBMITTED).open("a") as file:
        for each in submissions:
            values = {"run_directory": str(each.run_directory), "job": each.job}
            file.write(json.dumps(values | {"time": time.time()}) + "\n")


def read_submissions(folder: Path) -> dict[Path, str]:
    """The last job of each run."""
    path = folder / SUBMITTED
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines]
    return {Path(each["run_directory"]): each["job"] for each in values}


def queued(folder: Path, states: Mapping[str, str] | None) -> dict[Path, str]:
    """Of these the ones that wait or run, by SLURM's states.

    Raises:
        InputError: the states are not known, so that a run could be submitted twice.
    """
    if states is None:
        raise InputError(
            "squeue does not answer, so which runs are in the queue is not known and none was "
            "submitted; try again"
        )
    return {run: job for run, job in read_submissions(folder).items() if job in states}


def wait_until_ended(jobs: Sequence[str], *, say: Callable[[str], object]) -> None:
    """Return when none of the jobs waits or runs any more; while SLURM is silent, wait on."""
    silent = False
    while (states := job_states()) is None or any(job in states for job in jobs):
        if states is None and not silent:
            say("squeue does not answer; waiting until it does")
        silent = states is None
        time.sleep(LOOK_EVERY_SECONDS)
