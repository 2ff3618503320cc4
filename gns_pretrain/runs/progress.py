"""How far a run is, read from its directory."""

import math
from pathlib import Path

from gns_pretrain.errors import DamagedFileError
from gns_pretrain.runs.directory import METRICS, read_settings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.tracking.jsonl import last_record
from gns_pretrain.tracking.unit import unit_of


def images_in(epochs: float, num_images: int) -> int:
    """Images that so many passes over `num_images` take, the last one begun included."""
    return math.ceil(round(epochs * num_images, 6))  # 0.7 * 10 is a little more than 7


def budget_of(directory: Path) -> int | None:
    """A run's budget in its own unit, tokens or images; None where nothing says so yet."""
    settings = read_settings(directory)
    for name in ("token_budget", "sample_budget"):
        if (given := settings.get(name)) is not None:
            return int(given)
    epochs = settings.get("epochs")
    try:
        num_images = read_provenance(directory).get("data", {}).get("num_images")
    except DamagedFileError:
        num_images = None
    return images_in(epochs, num_images) if epochs and num_images else None


def share_done(directory: Path) -> float:
    """Share of its budget that a run has consumed; 0 where that cannot be read."""
    try:
        budget, last = budget_of(directory), last_record(directory / METRICS, kind="train")
    except DamagedFileError:
        return 0.0
    return min(last.get(unit_of(last).name, 0) / budget, 1.0) if budget else 0.0
