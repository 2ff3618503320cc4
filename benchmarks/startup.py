"""Seconds from `python train.py` to the first step's record, of real processes."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LOOKS_SECONDS = 0.02
GIVES_UP_SECONDS = 600


def measure_startup(overrides: list[str], *, starts: int, cold: bool = True) -> dict[str, Any]:
    """Start training several times and stop it after its first step.

    Args:
        overrides: of `train.py`, such as data.path=...
        starts: timed ones.
        cold: start once before, untimed among the warm ones, to fill the caches.

    Returns:
        One row: `seconds` is the median of the starts with a warm cache.

    Raises:
        InputError: a run ended before its first step; its last line says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        first = first_step_seconds(overrides, Path(folder) / "cold") if cold else None
        warm = [first_step_seconds(overrides, Path(folder) / f"{i}") for i in range(starts)]
    row: dict[str, Any] = {
        "measured": "startup",
        "overrides": " ".join(overrides),
        "starts": starts,
    }
    if first is not None:
        row["first_seconds"] = round(first, 2)
    return {
        **row,
        "seconds": round(statistics.median(warm), 2),
        "slowest_seconds": round(max(warm), 2),
    }


def first_step_seconds(overrides: list[str], outputs: Path) -> float:
    """One start: from the process to the first training record in metrics.jsonl."""
    outputs.mkdir()
    command = [sys.executable, "train.py", "run_name=startup", f"output_directory={outputs}"]
    log = outputs / "log"
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "metrics.progress=never", *overrides], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        while not first_step_is_recorded(outputs / "startup" / "metrics.jsonl"):
            if process.poll() is not None and process.returncode != 0:
                lines = log.read_text().strip().splitlines() or ["no output"]
                raise InputError(f"train.py ended before its first step: {lines[-1]}")
            if time.perf_counter() - began > GIVES_UP_SECONDS:
                raise InputError(
                    f"train.py took no step in {GIVES_UP_SECONDS} s; try a smaller run"
                )
            time.sleep(LOOKS_SECONDS)
        return time.perf_counter() - began
    finally:
        process.kill()  # its folder is thrown away: nothing to save
        process.wait()


def first_step_is_recorded(metrics: Path) -> bool:
    """Whether the record has a whole line of a training step."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return any(line.endswith("\n") and json.loads(line)["kind"] == "train" for line in lines)
