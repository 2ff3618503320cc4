"""slurm/train.sbatch and hydra/launcher=slurm on a real scheduler; one file, for there is one.

The job with faults takes longest, most of it waiting: it is submitted first and looked at last.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from gns_pretrain.launch.status import statuses
from gns_pretrain.runs.directory import is_finished
from gns_pretrain.runs.history import read_starts
from gns_pretrain.system.slurm import job_states, read_submitted
from gns_pretrain.tracking.jsonl import read_records
from tests.end_to_end import commands
from tests.slurm import jobs

SEEDS = (0, 1, 2)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass(frozen=True)
class Submitted:
    """A job, and the folder of its run and its log."""

    job: str
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


def events(folder: Path) -> list[dict]:
    return read_starts(folder / "small")


def outcomes(folder: Path) -> list[str]:
    return [event["outcome"] for event in events(folder) if event["event"] == "end"]


@pytest.fixture(scope="module")
def faulty(cluster, tmp_path_factory, shards) -> Submitted:
    """A run whose second rank raises, then hangs, then is killed, then is well."""
    folder = tmp_path_factory.mktemp("faulty")
    settings = (
        "optimizer=custom",
        "optimizer.class_path=tests.slurm.faulty.Faulty",
        "parallel.timeout_seconds=20",
        "checkpoint.asynchronous=false",  # faults come in the step after a save
    )
    # Not where another test has a job preempted.
    return Submitted(jobs.submit(cluster, folder, shards, *settings, node="n1"), folder)


@pytest.fixture(scope="module")
def whole(cluster, faulty, tmp_path_factory, shards) -> Submitted:
    """A run of two tasks that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Submitted(jobs.submit(cluster, folder, shards), folder)
    assert cluster.wait(run.job, *ENDED)["JobState"] == "COMPLETED", run.log
    return run


def test_two_tasks_train_one_run_and_write_what_it_was_made_with(whole):
    records = [record for record in jobs.lines(whole.folder) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, jobs.STEPS + 1))
    assert records[0]["accumulation"] == 2  # 8 sequences = 2 ranks x 2 sequences x 2 micro-batches
    start, end = events(whole.folder)
    assert start["ranks"] == 2
    assert start["git_revision"]
    assert start["slurm"] == {"job": whole.job, "starts": 0}
    assert start["environment"]["SLURM_JOB_ID"] == whole.job
    assert start["environment"]["CUDA_VISIBLE_DEVICES"] in ("0,1", "2,3")
    assert start["environment"]["NCCL_DEBUG"] == "WARN"
    assert end["outcome"] == "finished"


def test_two_nodes_of_two_gpus_train_one_run(cluster, whole, tmp_path, shards):
    run = Submitted(jobs.submit(cluster, tmp_path, shards, nodes=2), tmp_path)
    assert cluster.wait(run.job, *ENDED)["JobState"] == "COMPLETED", run.log
    start, _ = events(tmp_path)
    assert (start["ranks"], start["nodes"]) == (4, ["n1", "n2"])
    ours, theirs = jobs.lines(tmp_path), jobs.lines(whole.folder)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_signal_before_the_limit_saves_requeues_and_ends_with_the_same_lines(
    cluster, whole, tmp_path, shards
):
    run = Submitted(jobs.submit(cluster, tmp_path, shards), tmp_path)
    jobs.wait_for_step(tmp_path, 2)
    cluster.ask("scancel", "--signal=USR1", run.job)
    ended = cluster.wait(run.job, *ENDED)
    assert ended["JobState"] == "COMPLETED", run.log
    assert ended["Restarts"] == "1"
    assert f"job {run.job}: saved, and requeued to resume from there" in run.log
    assert "resumed from step" in run.log
    assert jobs.lines(tmp_path) == jobs.lines(whole.folder)
    assert outcomes(tmp_path) == ["stopped", "finished"]


def test_preempted_job_saves_lets_the_urgent_one_run_and_goes_on(cluster, tmp_path, shards):
    job = jobs.submit(cluster, tmp_path, shards, tasks=1, steps=120, node="n2")
    run = Submitted(job, tmp_path)
    jobs.wait_for_step(tmp_path, 2)
    urgent = cluster.submit(
        "--partition=urgent", "--nodelist=n2", "--gpus-per-node=8", "--wrap=true", cwd=tmp_path
    )
    assert cluster.wait(urgent, *ENDED)["JobState"] == "COMPLETED"
    assert cluster.wait(run.job, *ENDED)["JobState"] == "COMPLETED", run.log
    assert "asked to stop: saved at step" in run.log
    assert "resumed from step" in run.log
    assert outcomes(tmp_path) == ["stopped", "finished"]
    steps = [r["step"] for r in read_records(tmp_path / "small" / "metrics.jsonl") if "lr" in r]
    assert steps == list(range(1, 121))


def test_second_job_on_one_run_is_refused_and_a_cancelled_one_is_not_requeued(
    cluster, tmp_path, shards
):
    first = Submitted(jobs.submit(cluster, tmp_path, shards, tasks=1, steps=100_000), tmp_path)
    jobs.wait_for_step(tmp_path, 2)
    second = jobs.submit(cluster, tmp_path, shards, tasks=1, steps=100_000, log="second")
    ended = cluster.wait(second, *ENDED)
    log = (tmp_path / "second").read_text()
    assert ended["ExitCode"] == "2:0", log
    assert "small is in use by process" in log
    assert f"(SLURM job {first.job})" in log
    assert "not requeued: a setting or a file has to be mended" in log
    cluster.ask("scancel", first.job)
    ended = cluster.wait(first.job, *ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert not is_finished(tmp_path / "small")


def set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def test_multirun_submits_a_job_a_run_once_and_a_preempted_one_goes_on(
    cluster, tmp_path, shards, monkeypatch
):
    words = [
        "-m",
        *commands.arguments(tmp_path, shards, "metrics.log_every=1", steps=60)[1:],
        "run_name=small-${seed}",
        f"seed={','.join(map(str, SEEDS))}",
        "hydra/launcher=slurm",
        "hydra.launcher.max_parallel=2",
        "hydra.launcher.tasks_per_node=1",
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.cpus_per_task=1",
    ]
    environment = partial(set_variables, cluster.environment | jobs.ENVIRONMENT)
    assert commands.run(words, tmp_path / "log", environment) == 0
    log = (tmp_path / "log").read_text()
    logs = (tmp_path / "logs" / "slurm").resolve()
    submitted = read_submitted(logs)
    assert sorted(path.name for path in submitted) == [f"small-{seed}" for seed in SEEDS]
    for run, job in submitted.items():
        assert f"{run.name} submitted: as job {job}" in log
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    known = statuses(tmp_path, job_states())
    assert [(status.name, status.job) for status in known] == [
        (run.name, job) for run, job in sorted(submitted.items())
    ]
    assert {status.state for status in known} <= {"pending", "running"}

    first = submitted[(tmp_path / "small-0").resolve()]
    jobs.wait_for_step(tmp_path, 2, name="small-0")
    cluster.ask("scancel", "--signal=USR2", first)
    assert commands.run(words, tmp_path / "log", environment) == 0
    assert "in the queue as job" in (tmp_path / "log").read_text()
    assert read_submitted(logs) == submitted
    for job in submitted.values():
        output = logs / f"{job}_0_log.out"
        assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (
            output.read_text()
        )
    for seed in SEEDS:
        assert is_finished(tmp_path / f"small-{seed}")
    assert "saved, and requeued to resume from there" in (logs / f"{first}_0_log.out").read_text()
    losses = [read_records(run / "metrics.jsonl")[-1]["loss"] for run in submitted]
    assert len(set(losses)) == len(SEEDS)

    assert commands.run(words, tmp_path / "log", environment) == 0
    assert (tmp_path / "log").read_text().count("skipped") == len(SEEDS)
    assert {status.state for status in statuses(tmp_path, job_states())} == {"finished"}
    assert read_submitted(logs) == submitted


def test_rank_that_raises_hangs_or_is_killed_is_told_first_and_the_run_goes_on(cluster, faulty):
    ended = cluster.wait(faulty.job, *ENDED)
    assert ended["JobState"] == "COMPLETED", faulty.log
    assert ended["Restarts"] == "3"
    raised, hung, killed = faulty.log.split(f"==== job {faulty.job}, start ")[1:]
    first_line, *rest = raised.splitlines()[1:]
    assert first_line.startswith("rank 1 (process ")
    assert first_line.endswith("ValueError: this rank has a fault")
    assert rest[0] == "Traceback (most recent call last):"
    assert "resumed from step 5" in raised
    assert hung.splitlines()[1].startswith("rank 1 (process ")
    assert "left no error" in hung.splitlines()[1]
    assert "in hang_forever" in hung
    assert "resumed from step 10" in hung
    assert "resumed from step 15" in killed
    assert killed.splitlines()[1].startswith("rank 1 (process ")
    assert "left no error: killed from outside" in killed.splitlines()[1]
    assert "requeued from the last checkpoint: 3 of at most 3" in killed
    assert outcomes(faulty.folder) == ["failed", "failed", "failed", "finished"]
