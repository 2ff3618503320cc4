"""Finished runs as their records tell them: summaries, and curves over steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.metrics.jsonl import read_records


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
        summary = directory / "summary.json"
        if not summary.is_file():
            raise InputError(
                f"{summary} is missing: the run is not finished; start it again to finish it"
            )
        return cls(
            name=directory.name,
            directory=directory,
            records=read_records(directory / "metrics.jsonl"),
            summary=json.loads(summary.read_text()),
        )

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps, and a number of the lines of one kind; lines without the number are left out."""
        points = [
            (record["step"], record[key])
            for record in self.records
            if record["kind"] == kind and record.get(key) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]
