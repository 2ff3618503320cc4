"""The folder of a run: whose it is, and whether it is finished.

outputs/<run_name>/  config.yaml  run.json  starts.jsonl  metrics.jsonl  summary.json  checkpoints/
"""

import json
import platform
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.system.files import write_bytes, write_json
from gns_pretrain.tracking.jsonl import read_records

CONFIG, PROVENANCE, SUMMARY = "config.yaml", "run.json", "summary.json"
CHECKPOINTS = "checkpoints"


def is_finished(directory: Path) -> bool:
    """Whether the run in this folder has reached its budget."""
    try:
        summary = json.loads((directory / SUMMARY).read_text())
    except (OSError, ValueError):
        return False
    return bool(summary.get("state") == "finished")


def fresh(directory: Path) -> Path:
    """This folder's name, or the first free one after it: -2, -3, ... Nothing is deleted."""
    if not directory.exists():
        return directory
    number = 2
    while (candidate := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    return candidate


def write_provenance(directory: Path, config_text: str, data_fingerprint: str) -> None:
    """The resolved settings, and what the run was made with; an existing record stays."""
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / CONFIG, config_text.encode())
    if not (directory / PROVENANCE).exists():
        values = {
            "data_fingerprint": data_fingerprint,
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "run_id": new_run_id(),
        }
        write_json(directory / PROVENANCE, values)
    elif "run_id" not in read_provenance(directory):
        draw_run_id(directory)


def draw_run_id(directory: Path) -> str:
    """Give a run that has a record an id of its own in it."""
    run_id = new_run_id()
    write_json(directory / PROVENANCE, read_provenance(directory) | {"run_id": run_id})
    return run_id


def new_run_id() -> str:
    """A run's name at a tracking service, for as long as it lives."""
    return secrets.token_hex(8)


def read_provenance(directory: Path) -> dict[str, Any]:
    """What run.json holds, the data's fingerprint in any case.

    Raises:
        InputError: it is missing or damaged.
    """
    path = directory / PROVENANCE
    try:
        values = json.loads(path.read_text())
        return {"data_fingerprint": values["data_fingerprint"], **values}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is missing or damaged; restore it, or use another run_name"
        ) from error


def git_revision() -> str | None:
    """Revision of the code's checkout, with `+changes` if its files differ; None outside git."""
    root = Path(__file__).parents[2]
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return answer.stdout.strip() or None


# Runs as their folders tell them: settings, summaries, and curves over steps.

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """One run directory, read."""

    name: str
    directory: Path
    records: list[dict[str, Any]]  # lines of metrics.jsonl
    summary: dict[str, Any]  # summary.json

    @classmethod
    def read(cls, directory: Path) -> "RunRecord":
        """Read a finished run; InputError names the file that is missing."""
        summary = directory / SUMMARY
        if not summary.is_file():
            raise InputError(
                f"{summary} is missing: the run is not finished; start it again to finish it"
            )
        return cls(
            name=directory.name,
            directory=directory,
            records=read_records(directory / METRICS),
            summary=read_summary(directory),
        )


def read_summary(directory: Path) -> dict[str, Any]:
    """summary.json; empty where there is none, because the run is not finished."""
    path = directory / SUMMARY
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not JSON that can be read; remove it and start the run again"
        ) from error
    return summary if isinstance(summary, dict) else {}


def read_settings(directory: Path) -> dict[str, Any]:
    """config.yaml, nested; empty where there is none."""
    path = directory / CONFIG
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML that can be read; restore it") from error
    return settings if isinstance(settings, dict) else {}


def run_directories(path: Path) -> list[Path]:
    """The runs in a folder, at any depth; the folder itself if it is one's.

    Raises:
        InputError: there is no such folder.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder; name a run directory, or one that holds some")
    return list(_runs_below(path))


def _runs_below(path: Path) -> Iterator[Path]:
    """Does not look inside a run, where W&B keeps a config.yaml of its own."""
    if (path / CONFIG).is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _runs_below(child)
