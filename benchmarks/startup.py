"""Seconds from `python train.py` to the first step's record, of real processes."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from benchmarks.harness import ROOT, Command, Row
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, at_least

POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 600


@dataclass
class Startup(Command):
    """Seconds from `python train.py` to its first step."""

    overrides: Annotated[list[str], About("of train.py, such as model=small", positional=True)] = (
        field(default_factory=list)
    )
    starts: Annotated[int, at_least(1), About("timed, with a warm cache")] = 3
    warm: Annotated[bool, About("the cache is warm: no start before the timed ones")] = False

    def run(self) -> Iterator[Row]:
        """Yield one row; `seconds` is the median of the starts with a warm cache.

        Raises:
            InputError: a run ended before its first step; its last line says why.
        """
        with tempfile.TemporaryDirectory() as folder:
            seconds = [
                first_step_seconds(self.overrides, Path(folder) / f"{number}")
                for number in range(self.starts + (not self.warm))
            ]
        warm = seconds if self.warm else seconds[1:]
        yield {
            "measured": "startup",
            "overrides": " ".join(self.overrides),
            "starts": self.starts,
            **({} if self.warm else {"first_seconds": round(seconds[0], 2)}),
            "seconds": round(statistics.median(warm), 2),
            "slowest_seconds": round(max(warm), 2),
        }


def first_step_seconds(overrides: list[str], outputs: Path) -> float:
    """Start train.py, stop it after its first training record in metrics.jsonl; return the time."""
    outputs.mkdir()
    command = [sys.executable, "train.py", "run_name=startup", f"output_directory={outputs}"]
    log = outputs / "log"
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "metrics.progress=never", *overrides], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        while not has_trained(outputs / "startup" / "metrics.jsonl"):
            if process.poll() is not None and process.returncode != 0:
                lines = log.read_text().strip().splitlines() or ["no output"]
                raise InputError(f"train.py ended before its first step: {lines[-1]}")
            if time.perf_counter() - began > TIMEOUT_SECONDS:
                raise InputError(f"train.py took no step in {TIMEOUT_SECONDS} s; try a smaller run")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - began
    finally:
        process.kill()  # its folder is thrown away: nothing to save
        process.wait()


def has_trained(metrics: Path) -> bool:
    """Return whether the record has a whole line of a training step."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return any(line.endswith("\n") and json.loads(line)["kind"] == "train" for line in lines)
