"""What every figure carries: when, where, with what and by which command it was measured."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gns_pretrain.run_directory import git_revision

Row = dict[str, Any]
PACKAGES = ("numpy", "tokenizers", "transformers", "triton")


def provenance(arguments: list[str]) -> Row:
    """Date, machine, versions and command.

    Args:
        arguments: of scripts/benchmark.py.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    command = shlex.join(["python", "scripts/benchmark.py", *arguments])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"OMP_NUM_THREADS={threads} {command}" if threads else command,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> Row:
    """The processor, its cores, the memory and the GPU."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> Row:
    """Of Python, torch, CUDA, this code and the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "code": git_revision(),
        **found,
    }
