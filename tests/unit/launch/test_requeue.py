import json
import sys

import pytest

from gns_pretrain.launch import requeue
from gns_pretrain.launch.requeue import decide
from gns_pretrain.runs.history import append_event, read_starts


@pytest.mark.parametrize(
    ("code", "state", "failures", "again"),
    [
        (0, "RUNNING", 0, False),
        (75, "RUNNING", 0, True),  # saved before the limit, or in the grace of a preemption
        (75, "COMPLETING", 0, False),  # cancelled by its owner, or requeued by SLURM itself
        (75, None, 0, False),
        (2, "RUNNING", 1, False),  # a mistake in the settings
        (3, "RUNNING", 1, False),  # a loss that is not finite
        (1, "RUNNING", 3, True),
        (137, "RUNNING", 4, False),
        (137, "COMPLETING", 1, False),
    ],
)
def test_job_is_started_again_where_that_helps(code, state, failures, again):
    assert decide(code, state=state, failures=failures, at_most=3)[0] is again


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job 12 whose SLURM is two lists: the state that it gives, and what was requeued."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("GNS_JOB_FOLDER", str(tmp_path / "job-12"))
    requeued: list[str] = []
    monkeypatch.setattr(requeue, "job_state", lambda job_id: "RUNNING")
    monkeypatch.setattr(requeue, "requeue", lambda job_id: requeued.append(job_id) or True)
    return requeued


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["requeue", *words])
    assert requeue.main() == 0


def test_saved_job_is_requeued_and_counts_no_failure(job, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "75")
    assert job == ["12"]
    assert not (tmp_path / "job-12" / "failures.log").exists()
    assert capsys.readouterr().out == "job 12: saved, and requeued to resume from there\n"


def test_job_that_was_preempted_while_it_started_counts_no_failure(job, tmp_path, monkeypatch):
    call(monkeypatch, "143")
    assert job == ["12"]
    assert not (tmp_path / "job-12" / "failures.log").exists()


def test_failures_are_counted_over_the_starts_of_a_job(job, monkeypatch, capsys):
    for _ in range(3):
        call(monkeypatch, "9", "--at-most", "2")
    assert job == ["12", "12"]
    assert "failed 3 times, at most 2 are allowed" in capsys.readouterr().out


def test_failure_is_noted_in_the_runs_folder(job, tmp_path, monkeypatch):
    start = tmp_path / "job-12" / "start-1"
    start.mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    append_event(run, "start")
    word = {"rank": 0, "node": "n1", "process": 7, "run_directory": str(run)}
    (start / "rank_00000.json").write_text(json.dumps(word))
    call(monkeypatch, "137")
    end = read_starts(run)[-1]
    assert end["outcome"] == "failed"
    assert end["error"].startswith("rank 0 (process 7 on n1) left no error")
    call(monkeypatch, "137")  # noted already, as by a run that failed in good order
    assert [event["event"] for event in read_starts(run)] == ["start", "end"]
