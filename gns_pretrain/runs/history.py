"""starts.jsonl: each start of a run, on what and with what, and how it ended.

    {"event": "start", "time": .., "node": .., "process": .., "ranks": 8, "nodes": [..],
     "git_revision": .., "versions": {..}, "slurm": {..}, "environment": {..}}
    {"event": "end", "time": .., "outcome": "finished" | "stopped" | "failed", "error": ..}

A start without an end was killed, or is still running.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gns_pretrain.runs.directory import STARTS
from gns_pretrain.runs.provenance import git_revision, package_versions
from gns_pretrain.system.slurm import SlurmJob, node_name

# Prefixes of what can change a run's speed or its numbers; the rest of the environment is private.
RECORDED = (
    "SLURM_", "NCCL_", "TORCH", "PYTORCH_", "GLOO_", "OMP_", "MKL_", "CUDA_", "MASTER_", "FI_",
)  # fmt: skip
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "JWT")


def append_start(directory: Path, *, nodes: list[str], gpu: Mapping[str, Any]) -> None:
    """Record this start: `nodes` of each rank, and `gpu` among the versions."""
    job = SlurmJob.current()
    append_event(
        directory,
        "start",
        node=node_name(),
        process=os.getpid(),
        ranks=len(nodes),
        nodes=sorted(set(nodes)),
        git_revision=git_revision(),
        versions={**package_versions(), **gpu},
        slurm={"job": job.id, "starts": job.starts} if job else None,
        environment=recorded_environment(os.environ),
    )


def append_end(directory: Path, outcome: str, error: str | None = None) -> None:
    append_event(directory, "end", outcome=outcome, **({"error": error} if error else {}))


def append_event(directory: Path, event: str, **values: Any) -> None:
    """Append one line, in one write."""
    line = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
    with (directory / STARTS).open("a") as file:
        file.write(line)


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """All events but a torn one; none where the run has not started."""
    path = directory / STARTS
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def directory_of_requeued_job(directory: Path) -> Path | None:
    """The directory, this one or `-2`, `-3`, ..., that this SLURM job used before it was requeued.

    With resume=never a job takes a fresh directory once, not again each time that it is requeued.
    """
    job = SlurmJob.current()
    if job is None or job.starts == 0:
        return None
    for path in sorted(directory.parent.glob(f"{directory.name}*/{STARTS}")):
        jobs = [event.get("slurm") or {} for event in read_starts(path.parent)]
        if any(each.get("job") == job.id for each in jobs):
            return path.parent
    return None


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are recorded, by name; never a secret."""
    return {
        name: environment[name]
        for name in sorted(environment)
        if name.startswith(RECORDED) and not any(secret in name for secret in SECRETS)
    }
