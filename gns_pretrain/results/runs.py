"""Runs as their folders tell them: settings, summaries, and curves over steps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.metrics.jsonl import read_records
from gns_pretrain.run_directory import CONFIG, SUMMARY

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
