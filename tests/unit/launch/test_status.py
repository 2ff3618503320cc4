import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from gns_pretrain.errors import InputError
from gns_pretrain.launch.status import status_view, statuses
from gns_pretrain.runs.history import append_end, append_event
from gns_pretrain.system.slurm import append_submitted

NOW = 2_000_000_000.0


def make_run(folder: Path, *, steps: int = 3, job: str | None = None) -> Path:
    """A run of `steps` steps of 100 tokens, of 1,000, at 10 tokens per second."""
    folder.mkdir()
    (folder / "config.yaml").write_text("token_budget: 1000\n")
    append_event(folder, "start", slurm={"job": job, "starts": 0} if job else None)
    lines = [
        {
            "kind": "train",
            "step": step,
            "tokens": 100 * step,
            "loss": 5.0 - step,
            "batch_size": 8,
            "tokens_per_second": 10.0,
        }
        for step in range(1, steps + 1)
    ]
    lines.insert(1, {"kind": "validation", "step": steps, "tokens": 100 * steps, "loss": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in folder.iterdir():
        os.utime(path, (NOW - 60, NOW - 60))
    return folder


def only(path: Path, queue: dict[str, str] | None = None):
    (status,) = statuses(path, queue or {}, now=NOW)
    return status


def hold(run: Path, *, beat: float) -> None:
    """A process holds the run; its last beat is `beat` seconds ago."""
    (run / ".lock").write_text("process 5 on n1\n")
    os.utime(run / ".lock", (NOW - beat, NOW - beat))


def test_running_run_tells_its_numbers_and_when_it_will_end(tmp_path):
    run = make_run(tmp_path / "a")
    hold(run, beat=3)
    status = only(tmp_path)
    assert (status.state, status.step, status.done, status.loss) == ("running", 3, 0.3, 2.0)
    assert (status.validation_loss, status.ended) == (9.0, None)
    assert status.heartbeat == NOW - 3
    assert status.end == NOW + 70  # 700 tokens at 10 per second


def test_holder_that_has_gone_silent_has_failed(tmp_path):
    hold(make_run(tmp_path / "a"), beat=3600)
    status = only(tmp_path)
    assert (status.state, status.error, status.end) == ("failed", "killed", None)


def test_saved_run_is_preempted_until_it_runs_again(tmp_path):
    run = make_run(tmp_path / "a", job="12")
    append_end(run, "stopped")
    assert only(tmp_path).state == "preempted"
    assert only(tmp_path, {"12": "PENDING"}).state == "preempted"
    assert only(tmp_path, {"12": "RUNNING"}).state == "running"


def test_failed_run_tells_why_and_waits_where_it_was_requeued(tmp_path):
    run = make_run(tmp_path / "a", job="12")
    append_end(run, "failed", "rank 1 (process 7 on n1): KeyError: 'x'")
    assert only(tmp_path).error.endswith("KeyError: 'x'")
    assert only(tmp_path, {"12": "PENDING"}).state == "pending"


def test_view_has_a_row_a_run_and_a_line_a_failure(tmp_path):
    hold(make_run(tmp_path / "alive"), beat=3)
    append_end(make_run(tmp_path / "gone"), "failed", "rank 1: KeyError: 'x'")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status_view(statuses(tmp_path, {}, now=NOW), now=NOW))
    text = console.export_text()
    assert "1 failed, 1 running" in text
    row = next(line for line in text.splitlines() if "alive" in line)
    for cell in ("running", "3", "30%", "2.000", "9.0000", "8", "10", "in 1 min 10 s"):
        assert cell in row
    assert "gone: rank 1: KeyError: 'x'" in text


def test_finished_run_is_finished_whatever_the_queue_says(tmp_path):
    run = make_run(tmp_path / "a", job="12")
    (run / "summary.json").write_text('{"state": "finished"}')
    assert only(tmp_path, {"12": "RUNNING"}).state == "finished"
    assert only(tmp_path).ended == NOW - 60  # its last sign of life


def test_eighty_columns_hold_every_state_of_a_long_run(tmp_path):
    for name, state in {"a": "running", "b": "finished", "c": "preempted"}.items():
        run = make_run(tmp_path / f"table2-signsgd_large-demo-seed0-{name}")
        (run / "config.yaml").write_text("token_budget: 3200000000\n")
        line = {"kind": "train", "step": 97_000, "tokens": 1_600_000_000, "loss": 11.234}
        line |= {"batch_size": 2048, "tokens_per_second": 240_570.0}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if state == "running":
            hold(run, beat=3)
        else:
            append_end(run, state if state == "finished" else "stopped")
        if state == "finished":
            (run / "summary.json").write_text('{"state": "finished"}')
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(status_view(statuses(tmp_path, {}, now=NOW), now=NOW))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
    for state in ("running", "finished", "preempted"):
        (row,) = (line for line in lines[1:] if state in line.split())
        assert len(row.split()) >= 9  # no column is blank
        assert {"97,000", "11.234", "9.0000", "2,048", "241k"} <= set(row.split())


def test_submitted_run_without_a_folder_is_pending(tmp_path):
    append_submitted(tmp_path / "logs" / "slurm", [tmp_path / "b"], ["12_3"])
    assert only(tmp_path, {"12_3": "PENDING"}).state == "pending"
    assert statuses(tmp_path, {}) == []  # it has left the queue and nothing is there


def test_of_a_job_whose_queue_is_silent_nothing_is_claimed(tmp_path):
    make_run(tmp_path / "a", job="12")
    hold(make_run(tmp_path / "alive", job="14"), beat=3)
    make_run(tmp_path / "local")
    append_submitted(tmp_path / "logs" / "slurm", [tmp_path / "b"], ["13"])
    runs = statuses(tmp_path, None, now=NOW)
    assert {run.name: run.state for run in runs} == {
        "a": "unknown",
        "alive": "running",
        "b": "unknown",
        "local": "failed",
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(status_view(runs, now=NOW))
    assert "unknown: squeue does not answer; look again" in console.export_text()


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        statuses(tmp_path / "nowhere", {})
