"""`python train.py ... hydra/launcher=slurm` on a real scheduler."""

import os
from functools import partial

from gns_pretrain.metrics.jsonl import read_records
from gns_pretrain.results.status import statuses
from gns_pretrain.run_directory import is_finished
from gns_pretrain.slurm import job_states
from gns_pretrain.submissions import read_submissions
from tests.end_to_end import commands
from tests.slurm import jobs

SEEDS = (0, 1, 2)


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
        "hydra.launcher.at_once=2",
        "hydra.launcher.tasks_per_node=1",
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.cpus_per_task=1",
    ]
    environment = partial(set_variables, cluster.environment | jobs.ENVIRONMENT)
    assert commands.run(words, tmp_path / "log", environment) == 0
    log = (tmp_path / "log").read_text()
    logs = (tmp_path / "logs" / "slurm").resolve()
    submitted = read_submissions(logs)
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
    assert read_submissions(logs) == submitted
    for job in submitted.values():
        output = logs / f"{job}_0_log.out"
        assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (
            output.read_text()
        )
    for seed in SEEDS:
        assert is_finished(tmp_path / f"small-{seed}")
    assert "saved, and started again from there" in (logs / f"{first}_0_log.out").read_text()
    losses = [read_records(run / "metrics.jsonl")[-1]["loss"] for run in submitted]
    assert len(set(losses)) == len(SEEDS)

    assert commands.run(words, tmp_path / "log", environment) == 0
    assert (tmp_path / "log").read_text().count("skipped") == len(SEEDS)
    assert {status.state for status in statuses(tmp_path, job_states())} == {"finished"}
    assert read_submissions(logs) == submitted
