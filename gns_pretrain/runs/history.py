"""starts.jsonl in a run's folder: each start of the run, on what and with what, and how it ended.

    {"event": "start", "time": .., "node": .., "process": .., "ranks": 8, "nodes": [..],
     "git_revision": .., "versions": {..}, "slurm": {..}, "environment": {..}}
    {"event": "end", "time": .., "outcome": "finished" | "stopped" | "failed", "error": ..}

A start without an end was killed, or goes on.
"""

import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gns_pretrain.system.slurm import Job, node_name

STARTS = "starts.jsonl"
# What can change a run's speed or its numbers; the rest of the environment is nobody's business.
TOLD = ("SLURM_", "NCCL_", "TORCH", "PYTORCH_", "GLOO_", "OMP_", "MKL_", "CUDA_", "MASTER_", "FI_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "JWT")


def note_start(directory: Path, *, nodes: list[str]) -> None:
    """Write down this start.

    Args:
        directory: the run's folder.
        nodes: the node of each rank, in the order of ranks.
    """
    # Late, because it needs torch: who only reads or ends a start does without.
    from gns_pretrain.runs.directory import git_revision

    job = Job.current()
    note(
        directory,
        {
            "event": "start",
            "node": node_name(),
            "process": os.getpid(),
            "ranks": len(nodes),
            "nodes": sorted(set(nodes)),
            "git_revision": git_revision(),
            "versions": versions(),
            "slurm": {"job": job.id, "starts": job.starts} if job else None,
            "environment": told(os.environ),
        },
    )


def note_end(directory: Path, outcome: str, error: str | None = None) -> None:
    """Write down how the last start ended: finished, stopped or failed."""
    note(directory, {"event": "end", "outcome": outcome} | ({"error": error} if error else {}))


def note(directory: Path, values: dict[str, Any]) -> None:
    """Append one line, in one write."""
    line = json.dumps({"event": values["event"], "time": time.time()} | values) + "\n"
    with (directory / STARTS).open("a") as file:
        file.write(line)


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """All lines; a torn one is left out, and there are none in a folder of nobody's."""
    path = directory / STARTS
    lines = path.read_text().splitlines() if path.exists() else []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def has_ended(directory: Path) -> bool:
    """Whether the last start has noted its end itself."""
    events = read_starts(directory)
    return bool(events) and events[-1]["event"] == "end"


def begun_here(directory: Path) -> Path | None:
    """The folder, this one or `-2`, `-3`, ..., that this SLURM job began before it was requeued.

    With resume=never a job takes a fresh folder once, not again each time that it is requeued.
    """
    job = Job.current()
    if job is None or job.starts == 0:
        return None
    for candidate in sorted(directory.parent.glob(f"{directory.name}*/{STARTS}")):
        jobs = [event.get("slurm") or {} for event in read_starts(candidate.parent)]
        if any(each.get("job") == job.id for each in jobs):
            return candidate.parent
    return None


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are kept, by name; never a secret."""
    return {
        name: environment[name]
        for name in sorted(environment)
        if name.startswith(TOLD) and not any(secret in name for secret in SECRETS)
    }


def versions() -> dict[str, Any]:
    """Of what the numbers and the speed depend on."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
    }
