"""Which runs of a sweep are trained, and what is said of the others; see gns_pretrain/sweep.py."""

import json
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.compose import as_yaml
from gns_pretrain.config.schema import Config, LaunchSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.launch.sweep import Job, Outcome, plan_jobs, print_outcomes, settle
from gns_pretrain.launch.sweep_processes import (
    Running,
    command,
    outcome,
    reason,
    run_jobs,
    share_of_gpus,
)
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.runs.directory import draw_run_id, read_provenance
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings
from tests.settings import small_run

DATA = "fingerprint-of-the-data"


def make(folder: Path, name: str, **changes) -> Config:
    return small_run(folder, folder / "data", **({"run_name": name} | changes))


def inspect(config: Config) -> tuple[Path, str]:
    return Path(config.output_directory) / config.run_name, DATA


def planned(*configs: Config) -> list[Job]:
    runs = [((f"run_name={config.run_name}",), lambda config=config: config) for config in configs]
    return plan_jobs(runs, inspect=inspect)


def finish(config: Config, fingerprint: str = DATA) -> Path:
    """The folder that a finished run leaves, less its checkpoints."""
    folder, _ = inspect(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(as_yaml(config))
    (folder / "run.json").write_text(json.dumps({"data_fingerprint": fingerprint}))
    (folder / "metrics.jsonl").write_text('{"kind":"validation","step":20,"tokens":9,"loss":2.5}\n')
    summary = {
        "state": "finished",
        "steps": 20,
        "batch_size": 8,
        "minimum_validation_loss": 2.5,
        "seconds": 1.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_run_that_comes_twice_is_planned_once(tmp_path):
    jobs = planned(make(tmp_path, "a"), make(tmp_path, "b"), make(tmp_path, "a"))
    assert [job.name for job in jobs] == ["a", "b"]


def test_two_different_runs_of_one_name_are_refused_and_the_difference_named(tmp_path):
    with pytest.raises(InputError, match=r"run_name=a is .* differ in optimizer.lr; let run_name"):
        planned(make(tmp_path, "a"), make(tmp_path, "a", optimizer=AdamWSettings(lr=0.5)))


def test_sweep_with_a_run_that_cannot_start_starts_none_and_counts_each_reason(tmp_path):
    def refuse():
        raise InputError("scale.muon.lr has no value")

    runs = [((), lambda: make(tmp_path, "a")), ((), refuse), ((), refuse)]
    with pytest.raises(
        InputError, match=r"2 of the sweep's 3 runs .*muon.lr has no value \(2 runs"
    ):
        plan_jobs(runs, inspect=inspect)


def test_finished_run_is_skipped_and_its_summary_kept(tmp_path):
    config = make(tmp_path, "a")
    finish(config)
    (job,) = planned(config)
    settled = settle(job, say=print)
    assert settled.state == "skipped"
    assert settled.summary["minimum_validation_loss"] == 2.5


def test_interrupted_run_is_not_settled(tmp_path):
    config = make(tmp_path, "a")
    (finish(config) / "summary.json").unlink()
    (job,) = planned(config)
    assert settle(job, say=print) is None


def test_same_training_under_another_name_takes_over_the_record(tmp_path):
    twin = finish(make(tmp_path, "table2-signsgd_small", table="table2", cell="signsgd_small"))
    config = make(tmp_path, "table8-constant_small", table="table8", cell="constant_small")
    (job,) = planned(config)
    settled = settle(job, say=print)
    assert (settled.state, settled.why) == ("shared", f"the same training as {twin.name}")
    assert (job.directory / "metrics.jsonl").read_text() == (twin / "metrics.jsonl").read_text()
    assert (job.directory / "config.yaml").read_text() == as_yaml(config)
    summary = json.loads((job.directory / "summary.json").read_text())
    assert summary["same_as"] == twin.name
    assert settle(job, say=print).state == "skipped"


def test_constant_batch_is_the_same_whatever_theta_it_does_not_read(tmp_path):
    finish(make(tmp_path, "a"))
    other = BatchSizeSettings(initial=8, theta=0.1)
    (job,) = planned(make(tmp_path, "b", batch_size=other))
    assert settle(job, say=print).state == "shared"


@pytest.mark.parametrize(
    ("changes", "fingerprint"),
    [
        ({"seed": 1}, DATA),
        ({"optimizer": AdamWSettings(lr=0.5)}, DATA),
        ({"batch_size": BatchSizeSettings(initial=4)}, DATA),
        ({}, "other data"),
    ],
    ids=["seed", "setting", "batch", "data"],
)
def test_other_training_is_not_taken_over(tmp_path, changes, fingerprint):
    finish(make(tmp_path, "a", **changes), fingerprint)
    (job,) = planned(make(tmp_path, "b"))
    assert settle(job, say=print) is None
    assert not job.directory.exists()


@pytest.mark.parametrize("lost", ["config.yaml", "run.json"])
def test_folder_that_is_no_run_of_ours_is_nobodys_twin(tmp_path, lost):
    folder = finish(make(tmp_path, "a"))
    (folder / lost).unlink()
    foreign = finish(make(tmp_path, "0"))
    (foreign / "config.yaml").write_text("- {broken")
    older = finish(make(tmp_path, "1"))
    (older / "config.yaml").write_text("run_name: 1\n")
    (job,) = planned(make(tmp_path, "b"))
    assert settle(job, say=print) is None


def test_a_fresh_start_takes_over_no_record(tmp_path):
    finish(make(tmp_path, "a"))
    (job,) = planned(make(tmp_path, "b", resume="never"))
    assert settle(job, say=print) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [("micro_batch_size", (1, 2)), ("compile", ("always", "never")), ("seed", (0, 1))],
)
def test_no_run_of_a_sweep_is_dropped_because_its_folder_is_anothers(tmp_path, name, values):
    runs = [make(tmp_path, "a", **{name: value}) for value in values]
    with pytest.raises(InputError, match=rf"differ in {name}; let run_name .*a-\$\{{{name}\}}"):
        planned(*runs)


def test_sweep_over_data_does_not_train_the_first_alone(tmp_path):
    runs = [
        replace(make(tmp_path, "a"), data=DataSettings(path=path, sequence_length=16))
        for path in ("data/one", "data/other")
    ]
    told = r"run_name=a is the name of two runs that differ in data.path, data_fingerprint; start"
    with pytest.raises(InputError, match=told):
        plan_jobs(
            [((), lambda config=config: config) for config in runs],
            inspect=lambda config: (tmp_path / "a", config.data.path),
        )


def test_a_failure_is_told_from_the_attempts_own_words(tmp_path):
    (job,) = planned(make(tmp_path, "a"))
    log = tmp_path / "log"
    earlier = "error: no space left\n"
    log.write_text(earlier + "step 1\n")
    process = SimpleNamespace(returncode=-9)
    told = outcome(Running(job, process, log, slot=0, log_start=len(earlier)))
    assert (told.state, told.why) == ("failed", f"killed by SIGKILL ({log})")


def test_a_run_that_was_asked_to_stop_while_it_loads_has_not_failed(tmp_path):
    (job,) = planned(make(tmp_path, "a"))
    process = SimpleNamespace(returncode=-15)
    log = tmp_path / "log"
    log.write_text("")
    assert outcome(Running(job, process, log, slot=0, asked=True)).state == "stopped"
    assert outcome(Running(job, process, log, slot=0)).state == "failed"


def test_an_error_of_the_sweep_stops_the_runs_under_way(tmp_path, monkeypatch):
    """The first run is under way when the second one's record turns out to be broken."""
    jobs = planned(make(tmp_path, "a"), make(tmp_path, "b"))
    asked = []

    def settled(job, *, say):
        if job.name == "b":
            raise OSError("no space left")

    def started(job, *, slot, at_once):
        return Running(job, SimpleNamespace(send_signal=asked.append), tmp_path / "log", slot)

    monkeypatch.setattr("gns_pretrain.launch.sweep_processes.settle", settled)
    monkeypatch.setattr("gns_pretrain.launch.sweep_processes.start", started)
    with pytest.raises(OSError, match="no space left"):
        run_jobs(jobs, at_once=2, console=Console(file=StringIO()))
    assert asked == [signal.SIGTERM]


def test_record_taken_over_is_told_to_wandb_too(tmp_path, monkeypatch):
    told, ids = [], []

    class View:
        def __init__(self, directory, settings, *, config, run_id):
            told.append(config["run_name"])
            ids.append(run_id)

        def write(self, record):
            told.append(record["loss"])

        def finish(self, summary):
            told.append(summary["same_as"])

    monkeypatch.setattr("gns_pretrain.launch.sweep.WandbView", View)
    finish(make(tmp_path, "a"))
    twins = draw_run_id(tmp_path / "a")
    metrics = MetricsSettings(wandb=WandbSettings(enabled=True))
    (job,) = planned(make(tmp_path, "b", metrics=metrics))
    settle(job, say=print)
    assert told == ["b", 2.5, "a"]
    assert ids == [read_provenance(tmp_path / "b")["run_id"]] != [twins]


def test_outcomes_are_shown_whole_on_a_narrow_terminal():
    console = Console(file=StringIO(), width=30)
    summary = {"steps": 20, "batch_size": 8, "minimum_validation_loss": 2.5, "seconds": 3.2}
    long_name = "table2-signum_adaptive-demo-seed0-batch_size.theta=0.5"
    finished = Outcome(long_name, "finished", summary=summary)
    print_outcomes([finished, Outcome("b", "failed", "the loss is nan")], console)
    text = console.file.getvalue()
    assert "2 runs" in text
    assert long_name in text
    assert "2.5000" in text
    assert "b failed: the loss is nan" in text


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("step 1\nerror: step 3: the loss is nan\n", 3, "step 3: the loss is nan"),
        ("step 1\nstep 2\n", -9, "killed by SIGKILL"),
        ("Traceback\nValueError: odd\n", 1, "ValueError: odd"),
        ("", 1, "exit code 1"),
    ],
    ids=["error-line", "signal", "last-line", "silent"],
)
def test_reason_of_a_failure(text, code, expected):
    assert reason(text, code) == expected


@pytest.mark.parametrize(("environment", "threads"), [({}, 4), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_runs_side_by_side_share_the_cores_that_the_job_has(
    environment, threads, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (job,) = planned(make(tmp_path, "a", launch=LaunchSettings(threads=None)))
    assert command(job, at_once=2)[-1] == f"launch.threads={threads}"


def test_runs_side_by_side_have_gpus_of_their_own():
    shares = [share_of_gpus(slot, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) for slot in (0, 1)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5", "6,7"]
    assert share_of_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": "4"}) == {}
