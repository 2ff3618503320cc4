"""What a run was made with (run.json), and each of its starts and how it ended (starts.jsonl).

    {"event": "start", "time": .., "node": .., "process": .., "ranks": 8, "nodes": [..],
     "git_revision": .., "versions": {..}, "slurm": {..}, "environment": {..}}
    {"event": "end", "time": .., "outcome": "finished" | "stopped" | "failed", "error": ..}

A start without an end was killed, or is still running. Versions are read without importing the
packages.
"""

import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gns_pretrain.runs.directory import CONFIG, PROVENANCE, STARTS
from gns_pretrain.system.files import parse, read_json, read_lines, write_bytes, write_json
from gns_pretrain.system.slurm import SlurmJob, node_name

FIRST_CHECKPOINT = "first_checkpoint"  # entry of run.json: the step of the first one saved
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Provenance:
    """What of run.json is read."""

    data_fingerprint: str
    run_id: str | None = None


@dataclass(frozen=True)
class Event:
    """What of a line of starts.jsonl is read."""

    event: str
    time: float | None = None  # Unix
    outcome: str | None = None
    error: str | None = None
    slurm: dict[str, Any] | None = None


def write_provenance(
    directory: Path,
    config_text: str,
    data_fingerprint: str,
    data: Mapping[str, Any] | None = None,
    init: Mapping[str, Any] | None = None,
) -> None:
    """Write config.yaml, and run.json if there is none; one without a run id gets one.

    Args:
        directory: of the run.
        config_text: its settings, as YAML.
        data_fingerprint: of its data.
        data: what else is known about it, and may be found elsewhere by the next start.
        init: what the run begins from, if anything.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / CONFIG, config_text.encode())
    if not (directory / PROVENANCE).exists():
        values = {"data_fingerprint": data_fingerprint, "git_revision": git_revision()}
        write_json(directory / PROVENANCE, values | package_versions())
    known = read_provenance(directory)
    # A start that saved nothing begins again from what its source has become.
    found = {name: dict(v) for name, v in (("data", data), ("init", init)) if v is not None}
    if known | found != known:
        write_json(directory / PROVENANCE, known | found)
    if "run_id" not in known:
        new_run_id(directory)


def new_run_id(directory: Path) -> str:
    """Replace the run's id in its run.json, by which W&B knows it for as long as it lives.

    The agent of a W&B sweep has chosen one already.
    """
    of_agent = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    run_id = of_agent or secrets.token_hex(8)
    write_json(directory / PROVENANCE, read_provenance(directory) | {"run_id": run_id})
    return run_id


def note_checkpoint(directory: Path, step: int) -> None:
    """Note in run.json that the run has saved itself, and must not restart from nothing.

    A run that was built by itself, without `gns_pretrain.launch.train`, has no such file.
    """
    if not (directory / PROVENANCE).is_file():
        return
    values = read_provenance(directory)
    if FIRST_CHECKPOINT not in values:
        write_json(directory / PROVENANCE, values | {FIRST_CHECKPOINT: step})


def read_provenance(directory: Path) -> dict[str, Any]:
    """Read run.json, with its `data_fingerprint`; DamagedFileError if missing or damaged."""
    path, hint = directory / PROVENANCE, "restore it, or use another run_name"
    values = read_json(path, hint=hint)
    parse(Provenance, values, source=path, hint=hint)
    return values


def git_revision() -> str | None:
    """Revision of the code's checkout, with `+changes` if its files differ; None outside one.

    An installed package may lie in the checkout of something else.
    """
    if not (ROOT / "pyproject.toml").is_file():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch and those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# What can change a run's speed or its numbers, or says where it ran. By name: SLURM, NCCL and torch
# also have variables that hold secrets, and the rest of the environment is private.
RECORDED = {
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES", "FI_PROVIDER", "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT",
    "MKL_NUM_THREADS", "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CUMEM_ENABLE", "NCCL_DEBUG",
    "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS", "NCCL_NET",
    "NCCL_NET_GDR_LEVEL", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_PROTO",
    "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "OMP_PROC_BIND",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME", "SLURM_CPUS_PER_TASK", "SLURM_GPUS", "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE",
    "SLURM_RESTART_COUNT", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_COMPILE_DISABLE", "TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
}  # fmt: skip


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
    """All events but torn ones; none where the run has not started."""
    return read_lines(directory / STARTS, Event)


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
    """The variables that explain a run, by name."""
    return {name: environment[name] for name in sorted(RECORDED & environment.keys())}
