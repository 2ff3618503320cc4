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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gns_pretrain.errors import DamagedFileError, InputError, one_line
from gns_pretrain.system.files import parse, read_bytes, read_json
from gns_pretrain.tracking import jsonl

CONFIG, PROVENANCE, STARTS, LOCK = "config.yaml", "run.json", "starts.jsonl", ".lock"
METRICS, SUMMARY, CHECKPOINTS = jsonl.METRICS, jsonl.SUMMARY, "checkpoints"

# What batch_size.target=inflection means in an old config.yaml: 64/9 of the noise scale. Newer runs
# never record that name (`noise_scale.geometries.RECORDED_INFLECTION`).
OLD_INFLECTION = "inflection_v1"


@dataclass(frozen=True)
class KnownSettings:
    """What of config.yaml is read without its schema, by whatever version it was written."""

    run_name: str | None = None
    table: str | None = None
    cell: str | None = None
    seed: int = 0
    token_budget: int | None = None
    epochs: float | None = None
    sample_budget: int | None = None
    micro_batch_size: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    batch_size: dict[str, Any] = field(default_factory=dict)
    noise_scale: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    scale: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What of summary.json is read."""

    state: str = ""
    steps: int | None = None
    tokens: int | None = None
    samples: int | None = None
    batch_size: int | None = None
    validation_loss: float | None = None
    minimum_validation_loss: float | None = None
    maximum_accuracy: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    seconds: float | None = None


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


def make_fresh(directory: Path) -> Path:
    """Make this directory, or the first free one of -2, -3, ..., and return it: nobody else's."""
    while True:
        candidate = fresh_directory(directory)
        candidate.parent.mkdir(parents=True, exist_ok=True)
        try:
            candidate.mkdir()
        except FileExistsError:  # another start was faster
            continue
        return candidate


def read_summary(directory: Path) -> dict[str, Any]:
    """Read summary.json, {} where there is none; DamagedFileError if it is damaged."""
    path, hint = directory / SUMMARY, "remove it and start the run again"
    if not path.exists():
        return {}
    summary = read_json(path, hint=hint)
    parse(Summary, summary, source=path, hint=hint)
    return summary


def read_settings(directory: Path) -> dict[str, Any]:
    """Read config.yaml, nested, with today's names; {} where there is none.

    Raises:
        DamagedFileError: it is damaged.
    """
    path, hint = directory / CONFIG, "restore it, or use another run_name"
    if not path.exists():
        return {}
    content = read_bytes(path, hint=hint)
    try:
        settings = yaml.load(content.decode(), Loader=PlainLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({one_line(error)}); {hint}") from error
    if not isinstance(settings, dict) or not settings:
        raise DamagedFileError(f"{path} is damaged (no settings in it); {hint}")
    parse(KnownSettings, settings, source=path, hint=hint)
    followed = settings.get("batch_size", {})
    shadows = followed.get("shadows")
    for policy in (followed, *(shadows if isinstance(shadows, list) else [])):
        if isinstance(policy, dict) and policy.get("target") == "inflection":
            policy["target"] = OLD_INFLECTION
    return settings


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
