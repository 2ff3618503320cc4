"""What SLURM tells a process of its job, and what SLURM is asked. Needs neither torch nor a run."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

JOB_FOLDER = "GNS_JOB_FOLDER"  # set by the batch script: where a job's ranks leave word of an end
ANSWER_SECONDS = 60  # of scontrol and squeue; a busy controller takes a while


@dataclass(frozen=True)
class Job:
    """The job that this process is part of."""

    id: str  # of an array's element too: its own number
    starts: int  # earlier starts of this job: 0 unless it was requeued
    folder: Path | None  # of this start, for the ranks' words; None where nobody gathers them

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> "Job | None":
        """The job of this process; None outside of SLURM."""
        if "SLURM_JOB_ID" not in environment:
            return None
        starts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        folder = environment.get(JOB_FOLDER)
        return cls(
            id=environment["SLURM_JOB_ID"],
            starts=starts,
            folder=Path(folder) / f"start-{starts}" if folder else None,
        )


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine by the name that SLURM has for it, or its own."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(node_list: str) -> str:
    """First node of SLURM's short form: `gpu[03-05,9],login` begins with `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    assert match, node_list
    return match[1] + (match[2] or "")


def job_state(job_id: str) -> str | None:
    """RUNNING, COMPLETING, PENDING, ...; None if SLURM does not know or does not answer."""
    answer = ask("scontrol", "--oneliner", "show", "job", job_id)
    match = re.search(r"\bJobState=(\w+)", answer or "")
    return match[1] if match else None


def job_states() -> dict[str, str] | None:
    """State of each of the jobs in the queue, by job id; empty where there is no SLURM.

    None where SLURM does not answer: then nobody knows, and no job may be taken for ended.
    """
    if shutil.which("squeue") is None:
        return {}
    answer = ask("squeue", "--noheader", "--all", "--array", "--format=%A %F_%K %T", "--me")
    if answer is None:
        return None
    states: dict[str, str] = {}
    for line in answer.splitlines():
        number, element, state = line.split()
        # An element of an array that waits has no number of its own yet.
        states[element.removesuffix("_N/A")] = state
        states.setdefault(number, state)
    return states


def requeue(job_id: str) -> bool:
    """Have SLURM end this job here and start it anew; whether it agreed."""
    return ask("scontrol", "requeue", job_id) is not None


def ask(*command: str) -> str | None:
    """What one of SLURM's commands answers; None if it is not there or refuses."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
