"""Which runs of a sweep are trained, and what is said of the others; see gns_pretrain/sweep.py."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.composition import as_yaml
from gns_pretrain.config import Config
from gns_pretrain.errors import InputError
from gns_pretrain.metrics.settings import MetricsSettings, WandbSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.sweep import Job, Outcome, plan_jobs, print_outcomes, settle
from gns_pretrain.sweep_processes import reason, share_of_gpus
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


def test_record_taken_over_is_told_to_wandb_too(tmp_path, monkeypatch):
    told = []

    class View:
        def __init__(self, directory, settings, *, config, run_id):
            told.append(config["run_name"])

        def write(self, record):
            told.append(record["loss"])

        def finish(self, summary):
            told.append(summary["same_as"])

    monkeypatch.setattr("gns_pretrain.sweep.WandbView", View)
    finish(make(tmp_path, "a"))
    metrics = MetricsSettings(wandb=WandbSettings(enabled=True))
    (job,) = planned(make(tmp_path, "b", metrics=metrics))
    settle(job, say=print)
    assert told == ["b", 2.5, "a"]


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
def test_reason_of_a_failure(tmp_path, text, code, expected):
    log = tmp_path / "log"
    log.write_text(text)
    assert reason(log, code) == expected


def test_runs_side_by_side_have_gpus_of_their_own():
    shares = [share_of_gpus(slot, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) for slot in (0, 1)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5", "6,7"]
    assert share_of_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": "4"}) == {}
