"""The names under which the views plot a record's numbers; the same in W&B and TensorBoard."""

from typing import Any

AXES = ("step", "tokens", "samples")
_PREFIXES = {"train": "train", "validation": "val", "batch_size": "batch_size"}


def axes(record: dict[str, Any]) -> dict[str, int]:
    """The positions a record carries, each usable as an x-axis: trainer/step and so on."""
    return {f"trainer/{axis}": record[axis] for axis in AXES if axis in record}


def series(record: dict[str, Any]) -> dict[str, float]:
    """The numbers a record carries, by series: train/loss, val/loss, noise/<geometry>/<estimate>/…,
    shadow/<policy>/…

    Names and undefined values (null) are left out.
    """
    prefix = _PREFIXES.get(record["kind"])
    if record["kind"] == "shadow":
        prefix = f"shadow/{record['policy']}"
    elif prefix is None:
        prefix = f"{record['kind']}/{record['geometry']}/{record['estimate']}"
    return {
        f"{prefix}/{name}": value
        for name, value in record.items()
        if name not in AXES and isinstance(value, int | float)
    }
