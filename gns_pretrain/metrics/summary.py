"""summary.json: what a finished run comes to, taken from its own record."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from gns_pretrain.files import write_bytes


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run from all its lines, also those written before it was resumed.

    Args:
        records: The lines of metrics.jsonl, in order.

    Returns:
        steps, samples (sequences) and tokens consumed; validation_loss (the last) and
        minimum_validation_loss (nats per token) with the step and tokens of the first line that
        has it; tokens_per_second (median over steps: compilation and evaluation do not count);
        seconds (sum over training steps); batch_size (sequences, the last). None where no line
        says.
    """
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    last_step = train[-1] if train else {}
    lowest = min(validation, key=lambda record: record["loss"], default={})
    return {
        "steps": last_step.get("step", 0),
        "samples": last_step.get("samples", 0),
        "tokens": last_step.get("tokens", 0),
        "validation_loss": validation[-1]["loss"] if validation else None,
        "minimum_validation_loss": lowest.get("loss"),
        "minimum_validation_loss_step": lowest.get("step"),
        "minimum_validation_loss_tokens": lowest.get("tokens"),
        "tokens_per_second": median(r["tokens_per_second"] for r in train) if train else None,
        "seconds": sum(record["step_seconds"] for record in train),
        "batch_size": last_step.get("batch_size"),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json; it is either whole or not there."""
    write_bytes(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
