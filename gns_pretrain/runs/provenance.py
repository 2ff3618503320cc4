"""run.json: what a run was made with. Versions are read without importing the packages."""

import json
import platform
import secrets
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import CONFIG, PROVENANCE
from gns_pretrain.system.files import write_bytes, write_json

ROOT = Path(__file__).parents[2]


def write_provenance(directory: Path, config_text: str, data_fingerprint: str) -> None:
    """Write config.yaml, and run.json if there is none; one without a run id gets one."""
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / CONFIG, config_text.encode())
    if not (directory / PROVENANCE).exists():
        values = {"data_fingerprint": data_fingerprint, "git_revision": git_revision()}
        write_json(directory / PROVENANCE, values | package_versions())
    if "run_id" not in read_provenance(directory):
        new_run_id(directory)


def new_run_id(directory: Path) -> str:
    """Replace the run's id in its run.json, by which W&B knows it for as long as it lives."""
    run_id = secrets.token_hex(8)
    write_json(directory / PROVENANCE, read_provenance(directory) | {"run_id": run_id})
    return run_id


def read_provenance(directory: Path) -> dict[str, Any]:
    """run.json, which holds `data_fingerprint` at least.

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
