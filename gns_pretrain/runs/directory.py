"""The files of a run directory, and reading them.

outputs/<run_name>/
    config.yaml     the resolved settings
    run.json        the data (fingerprint, folder, bos and eos), code revision, versions, W&B's id
    starts.jsonl    each start, and how it ended
    metrics.jsonl   the record
    summary.json    once the run is finished
    checkpoints/    step_00001200/, ...
    .lock           names the process that runs it
    flight_record_rank_0, ..., rank_00000.stack, ...    left by ranks that hung or crashed
"""

import os
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import InputError
from gns_pretrain.system.files import read_json
from gns_pretrain.tracking import jsonl

CONFIG, PROVENANCE, STARTS, LOCK = "config.yaml", "run.json", "starts.jsonl", ".lock"
METRICS, SUMMARY, CHECKPOINTS = jsonl.METRICS, jsonl.SUMMARY, "checkpoints"


class PlainLoader(yaml.SafeLoader):
    """Loads plain values; a file of a few aliases to aliases would unfold to billions of them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias, of which a run's own file has none."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it holds the alias *{self.peek_event().anchor}")
        return super().compose_node(parent, index)


def is_finished(directory: Path) -> bool:
    """Whether the run has reached its budget; a damaged summary counts as none."""
    try:
        return bool(read_summary(directory).get("state") == "finished")
    except InputError:
        return False


def fresh_directory(directory: Path) -> Path:
    """This directory if it does not exist, else the first free one of -2, -3, ..."""
    candidate, number = directory, 2
    while candidate.exists():
        candidate, number = directory.with_name(f"{directory.name}-{number}"), number + 1
    return candidate


def read_summary(directory: Path) -> dict[str, Any]:
    """Read summary.json, {} where there is none; InputError if it is damaged."""
    path = directory / SUMMARY
    return read_json(path, hint="remove it and start the run again") if path.is_file() else {}


def read_settings(directory: Path) -> dict[str, Any]:
    """Read config.yaml, nested; {} where there is none. InputError if it is damaged."""
    path = directory / CONFIG
    if not path.is_file():
        return {}
    try:
        settings = yaml.load(path.read_text(), Loader=PlainLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is damaged ({reason}); restore it, or use another run_name"
        ) from error
    return settings if isinstance(settings, dict) else {}


def run_directories(path: Path) -> list[Path]:
    """List the run directories below a folder, or itself; InputError if it is missing."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name a run directory, or a folder of some")
    found = []
    seen = set()  # links may lead back up
    for folder, children, files in os.walk(path, followlinks=True):
        identity = os.path.realpath(folder)
        if identity in seen:
            children.clear()
            continue
        seen.add(identity)
        if CONFIG in files:
            found.append(Path(folder))
            children.clear()  # W&B keeps a config.yaml of its own inside a run
        children[:] = sorted(child for child in children if not child.startswith("."))
    return found
