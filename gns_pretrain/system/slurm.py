"""SLURM: what it sets for a process of a job, its commands, and which run has which job.

Needs neither torch nor a run. Submissions are lines of `logs/slurm/submitted.jsonl`.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.system.files import read_lines

JOB_FOLDER = "GNS_JOB_FOLDER"  # set by the batch script: where a job's ranks write crash reports
TIMEOUT_SECONDS = 60  # of scontrol and squeue; a busy controller takes a while


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is part of."""

    id: str  # of an array's element too: its own number
    starts: int  # earlier starts of this job: 0 unless it was requeued
    folder: Path | None  # of this start, for crash reports; None where nobody collects them

    @classmethod
    def current(cls) -> "SlurmJob | None":
        """The job of this process; None outside of SLURM."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        folder = os.environ.get(JOB_FOLDER)
        return cls(
            id=os.environ["SLURM_JOB_ID"],
            starts=starts,
            folder=Path(folder) / f"start-{starts}" if folder else None,
        )


def node_name() -> str:
    """This machine's name in SLURM, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(node_list: str) -> str:
    """First node of SLURM's short form: `gpu[03-05,9],login` begins with `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    assert match, node_list
    return match[1] + (match[2] or "")


def job_state(job_id: str) -> str | None:
    """RUNNING, COMPLETING, PENDING, ...; None if SLURM does not know the job or does not answer."""
    output = run_command("scontrol", "--oneliner", "show", "job", job_id)
    match = re.search(r"\bJobState=(\w+)", output or "")
    return match[1] if match else None


def job_states() -> dict[str, str] | None:
    """State of each of the user's jobs in the queue, by job id; empty where there is no SLURM.

    None where SLURM does not answer: then no job may be taken for ended.
    """
    if shutil.which("squeue") is None:
        return {}
    output = run_command("squeue", "--noheader", "--all", "--array", "--format=%A %F_%K %T", "--me")
    if output is None:
        return None
    states: dict[str, str] = {}
    for line in output.splitlines():
        number, element, state = line.split()
        # A pending element of an array has no number of its own yet.
        states[element.removesuffix("_N/A")] = state
        states.setdefault(number, state)
    return states


def requeue(job_id: str) -> bool:
    """End this job and put it back into the queue; return whether SLURM agreed."""
    return run_command("scontrol", "requeue", job_id) is not None


def run_command(*command: str) -> str | None:
    """Output of one of SLURM's commands; None if it is missing, fails or does not answer."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


LOG_FOLDER = ("logs", "slurm")  # beside the runs, on a file system that all nodes share
SUBMITTED = "submitted.jsonl"
POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Submission:
    """A line of submitted.jsonl."""

    run_directory: str
    job: str  # 12, or 12_3 in an array


def append_submitted(folder: Path, directories: Sequence[Path], jobs: Sequence[str]) -> None:
    """Record the job of each run directory: 12, or 12_3 in an array."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SUBMITTED).open("a") as file:
        for directory, job in zip(directories, jobs, strict=True):
            values = {"run_directory": str(directory), "job": job, "time": time.time()}
            file.write(json.dumps(values) + "\n")


def read_submitted(folder: Path) -> dict[Path, str]:
    """The last job of each run directory."""
    values = read_lines(folder / SUBMITTED, Submission)
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
