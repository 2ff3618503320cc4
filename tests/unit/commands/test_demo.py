"""The table at the end of the demo."""

import io
import json
from pathlib import Path

from rich.console import Console

from gns_pretrain.commands.demo import closing_table
from tests.unit.run_records import write_run

SUMMARY = {"steps": 4, "tokens": 9, "batch_size": 8, "tokens_per_second": 5.0, "seconds": 1.0}


def finished(outputs: Path, name: str, losses: list[float], seconds: float) -> Path:
    """A run that is evaluated after each of its steps, of so many seconds."""
    evaluations = list(enumerate(losses, start=1))
    folder = write_run(outputs, "demo", name, evaluations)
    with (folder / "metrics.jsonl").open("a") as record:
        for step, _ in evaluations:
            line = {"kind": "train", "step": step, "loss": 1.0, "step_seconds": seconds}
            record.write(json.dumps(line) + "\n")
    summary = SUMMARY | {"state": "finished", "validation_loss": losses[-1]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_are_compared_by_the_time_to_a_loss_that_both_reach(tmp_path: Path) -> None:
    drawn = io.StringIO()
    runs = {
        "adaptive batch": finished(tmp_path, "adaptive", [5.0, 3.0, 2.0], seconds=20.0),
        "constant batch": finished(tmp_path, "constant", [6.0, 5.0, 4.0, 3.0], seconds=11.0),
    }
    Console(file=drawn, width=100).print(closing_table(runs))
    adaptive, constant = (line for line in drawn.getvalue().splitlines() if " batch │" in line)
    assert "3.0000 (s)" in drawn.getvalue()
    assert adaptive.split()[-2] == "40"  # the second of its steps
    assert constant.split()[-2] == "44"  # the last
