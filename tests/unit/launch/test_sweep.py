"""Which runs of a sweep are trained, and how the others are reported."""

import json
import os
import signal
import sys
from dataclasses import replace
from io import StringIO
from operator import itemgetter
from pathlib import Path

import pytest
from rich.console import Console

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.compose import as_yaml
from gns_pretrain.config.schema import Config, LaunchSettings
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch import sweep
from gns_pretrain.launch.sweep import (
    PlannedRun,
    RunProcess,
    RunResult,
    command,
    failed_runs_raise,
    failure_reason,
    plan_runs,
    printed_since,
    report_results,
    share_of_gpus,
    skip_or_reuse,
    stand_ins,
    train_runs,
)
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.runs.history import new_run_id, read_provenance
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings
from tests.settings import small_run

DATA = "fingerprint-of-the-data"
LOADING = "import time; time.sleep(60)"  # a run that does not listen to signals yet


def make(folder: Path, name: str, **changes) -> Config:
    return small_run(folder, folder / "data", **({"run_name": name} | changes))


def inspect(config: Config) -> tuple[Path, str]:
    return Path(config.output_directory) / config.run_name, DATA


def planned(*configs: Config) -> list[PlannedRun]:
    """The runs of a sweep whose overrides are whole configs."""
    return plan_runs([[config] for config in configs], itemgetter(0), inspect)


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
    first, other, again = planned(*(make(tmp_path, name) for name in "aba"))
    assert first is again
    assert (first.name, other.name) == ("a", "b")


def test_two_different_runs_of_one_name_are_refused_and_the_difference_named(tmp_path):
    with pytest.raises(InputError, match=r"run_name=a is .* differ in optimizer.lr; let run_name"):
        planned(make(tmp_path, "a"), make(tmp_path, "a", optimizer=AdamWSettings(lr=0.5)))


def test_sweep_with_a_run_that_cannot_start_starts_none_and_counts_each_reason(tmp_path):
    def compose(words):
        if "muon" in words:
            raise InputError("scale.muon.lr has no value")
        return make(tmp_path, "a")

    with pytest.raises(
        InputError, match=r"2 of the sweep's 3 runs .*muon.lr has no value \(2 runs"
    ):
        plan_runs([["sgd"], ["muon"], ["muon"]], compose, inspect)


def test_data_that_is_not_there_and_has_a_stand_in_is_named_once(tmp_path):
    missing = ImageDataSettings(path=str(tmp_path / "woof"), or_embedded=True)
    there = ImageDataSettings(path=str(tmp_path), or_embedded=True)
    runs = planned(
        *(replace(make(tmp_path, name), data=missing) for name in "ab"),
        replace(make(tmp_path, "c"), data=there),
        make(tmp_path, "d"),
    )
    assert stand_ins(runs) == [f"{tmp_path}/woof is not there, so the embedded digits"]


def test_finished_run_is_skipped_and_its_summary_kept(tmp_path):
    config = make(tmp_path, "a")
    finish(config)
    (run,) = planned(config)
    result = skip_or_reuse(run, log=print)
    assert result.state == "skipped"
    assert result.summary["minimum_validation_loss"] == 2.5


def test_interrupted_run_is_not_result(tmp_path):
    config = make(tmp_path, "a")
    (finish(config) / "summary.json").unlink()
    (run,) = planned(config)
    assert skip_or_reuse(run, log=print) is None


def test_same_training_under_another_name_takes_over_the_record(tmp_path):
    twin = finish(make(tmp_path, "table2-signsgd_small", table="table2", cell="signsgd_small"))
    config = make(tmp_path, "table8-constant_small", table="table8", cell="constant_small")
    (run,) = planned(config)
    result = skip_or_reuse(run, log=print)
    assert (result.state, result.why) == ("shared", f"the same training as {twin.name}")
    assert (run.directory / "metrics.jsonl").read_text() == (twin / "metrics.jsonl").read_text()
    assert (run.directory / "config.yaml").read_text() == as_yaml(config)
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["same_as"] == twin.name
    assert skip_or_reuse(run, log=print).state == "skipped"


def test_constant_batch_is_the_same_whatever_theta_it_does_not_read(tmp_path):
    finish(make(tmp_path, "a"))
    other = BatchSizeSettings(initial=8, theta=0.1)
    (run,) = planned(make(tmp_path, "b", batch_size=other))
    assert skip_or_reuse(run, log=print).state == "shared"


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
    (run,) = planned(make(tmp_path, "b"))
    assert skip_or_reuse(run, log=print) is None
    assert not run.directory.exists()


@pytest.mark.parametrize("lost", ["config.yaml", "run.json"])
def test_folder_that_is_no_run_of_ours_is_nobodys_twin(tmp_path, lost):
    folder = finish(make(tmp_path, "a"))
    (folder / lost).unlink()
    foreign = finish(make(tmp_path, "0"))
    (foreign / "config.yaml").write_text("- {broken")
    older = finish(make(tmp_path, "1"))
    (older / "config.yaml").write_text("run_name: 1\n")
    (run,) = planned(make(tmp_path, "b"))
    assert skip_or_reuse(run, log=print) is None


def test_a_fresh_start_takes_over_no_record(tmp_path):
    finish(make(tmp_path, "a"))
    (run,) = planned(make(tmp_path, "b", resume="never"))
    assert skip_or_reuse(run, log=print) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [("micro_batch_size", (1, 2)), ("compile", ("always", "never")), ("seed", (0, 1))],
)
def test_no_run_of_a_sweep_is_dropped_because_its_folder_is_anothers(tmp_path, name, values):
    runs = [make(tmp_path, "a", **{name: value}) for value in values]
    with pytest.raises(InputError, match=rf"differ in {name}; let run_name .*a-\$\{{{name}\}}"):
        planned(*runs)


@pytest.mark.parametrize(
    ("one", "other", "hint"),
    [
        ({"betas": [0.9, 0.95]}, {"betas": [0.8, 0.95]}, "start each by a command of its own"),
        ({"eps": 1e-8, "betas": [0, 0]}, {"eps": 1e-6}, r"'run_name=a-\$\{.*kwargs.eps\}'"),
        ({"betas": [0, 0], "eps": 1e-8}, {"eps": 1e-6}, r"'run_name=a-\$\{.*kwargs.eps\}'"),
    ],
)
def test_hint_for_a_name_that_two_runs_share_can_be_followed(tmp_path, one, other, hint):
    optimizers = [
        CustomSettings(lr=0.1, class_path="torch.optim.NAdam", kwargs=kwargs)
        for kwargs in (one, other)
    ]
    with pytest.raises(InputError, match=hint):
        planned(*(make(tmp_path, "a", optimizer=optimizer) for optimizer in optimizers))


def test_sweep_over_data_does_not_train_the_first_alone(tmp_path):
    runs = [
        replace(make(tmp_path, "a"), data=DataSettings(path=path, sequence_length=16))
        for path in ("data/one", "data/other")
    ]
    line = r"run_name=a is the name of two runs that differ in data.path, data_fingerprint; start"
    with pytest.raises(InputError, match=line):
        plan_runs(
            [[config] for config in runs],
            itemgetter(0),
            lambda config: (tmp_path / "a", config.data.path),
        )


@pytest.fixture
def programs(monkeypatch) -> dict[str, str]:
    """Python programs that stand for the commands of runs, by name."""
    programs: dict[str, str] = {}

    def faked(run, *, max_parallel):
        return [sys.executable, "-c", programs[run.name]]

    monkeypatch.setattr("gns_pretrain.launch.sweep.command", faked)
    return programs


def train(*runs: PlannedRun, max_parallel: int = 1) -> list[RunResult]:
    return train_runs(runs, max_parallel=max_parallel, console=Console(file=StringIO()))


def test_failure_is_explained_by_what_the_attempt_itself_printed(tmp_path, programs):
    (run,) = planned(make(tmp_path, "a"))
    log = tmp_path / "logs" / "a.log"
    log.parent.mkdir()
    log.write_text("error: no space left\n")
    programs["a"] = "import os, signal; print('step 1'); os.kill(os.getpid(), signal.SIGKILL)"
    (result,) = train(run)
    assert (result.state, result.why) == ("failed", f"killed by SIGKILL ({log})")


def test_one_run_that_fails_stops_no_other_and_results_keep_their_order(tmp_path, programs):
    runs = planned(*(make(tmp_path, name) for name in "abc"))
    programs |= {
        "a": "import time; time.sleep(0.5); raise SystemExit(75)",
        "b": "raise SystemExit('error: step 3: the loss is nan')",
        "c": "raise SystemExit(75)",
    }
    results = train(*runs, max_parallel=2)
    assert [(result.name, result.state) for result in results] == [
        ("a", "stopped"),
        ("b", "failed"),
        ("c", "stopped"),
    ]
    assert results[1].why.startswith("step 3: the loss is nan")


def test_run_that_was_stopped_while_it_loads_has_not_failed(tmp_path, programs):
    (run,) = planned(make(tmp_path, "a"))
    programs["a"] = LOADING
    process = RunProcess(run, slot=0, max_parallel=1)
    process.stop()
    process.stop()
    assert process.result() == RunResult("a", "stopped", "not started")
    programs["a"] = "import os; os.kill(os.getpid(), 15)"
    assert RunProcess(run, slot=0, max_parallel=1).result().state == "failed"


def test_request_to_stop_stops_what_runs_and_starts_nothing_more(tmp_path, programs):
    runs = planned(make(tmp_path, "a"), make(tmp_path, "b"))
    ask = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM)"
    programs |= {"a": f"{ask}; {LOADING}", "b": "raise SystemExit(1)"}
    before = signal.getsignal(signal.SIGTERM)
    assert [(result.state, result.why) for result in train(*runs)] == [
        ("stopped", "not started"),
        ("stopped", "not started"),
    ]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_sweep_stops_the_runs_under_way(tmp_path, monkeypatch, programs):
    """The first run is under way when the second one's record turns out to be broken."""
    runs = planned(make(tmp_path, "a"), make(tmp_path, "b"))
    programs["a"] = LOADING

    def broken(run, *, log):
        if run.name == "b":
            raise OSError("no space left")

    monkeypatch.setattr("gns_pretrain.launch.sweep.skip_or_reuse", broken)
    with pytest.raises(OSError, match="no space left"):  # after a's process has ended
        train(*runs, max_parallel=2)


def test_runs_of_one_name_in_two_output_directories_are_two_runs(tmp_path, programs):
    runs = planned(make(tmp_path / "one", "a"), make(tmp_path / "other", "a"))
    programs["a"] = "raise SystemExit(75)"
    assert [result.state for result in train(*runs)] == ["stopped", "stopped"]


def end_command(results: list[RunResult], raised: Exception | None) -> None:
    with failed_runs_raise():
        report_results(results, Console(file=StringIO()))
        if raised:
            raise raised


@pytest.mark.parametrize("raised", [None, TrainingError("lr=9 failed"), ValueError("no trial")])
def test_command_ends_with_the_runs_of_its_sweep_that_failed(raised):
    results = [RunResult("a", "finished"), RunResult("b", "failed", "the loss is nan")]
    line = r"1 of the sweep's 2 runs failed \(b\); the tables say why"
    with pytest.raises(TrainingError, match=line):
        end_command(results, raised)


def test_command_without_a_failed_run_ends_as_it_would():
    end_command([RunResult("a", "skipped")], None)
    with pytest.raises(InputError, match="bad point"):
        end_command([RunResult("a", "failed")], InputError("bad point"))


def test_copied_record_is_logged_to_wandb_too(tmp_path, monkeypatch):
    logged, ids = [], []

    class View:
        def __init__(self, directory, settings, *, config, run_id, records, **more):
            logged.append(config["run_name"])
            ids.append(run_id)
            logged.extend(record["loss"] for record in records)

        def finish(self, summary):
            logged.append(summary["same_as"])

        def close(self, error):
            logged.append("closed")

    monkeypatch.setattr("gns_pretrain.launch.upload.WandbView", View)
    finish(make(tmp_path, "a"))
    twins = new_run_id(tmp_path / "a")
    metrics = MetricsSettings(wandb=WandbSettings(enabled=True))
    (run,) = planned(make(tmp_path, "b", metrics=metrics))
    skip_or_reuse(run, log=print)
    assert logged == ["b", 2.5, "a", "closed"]
    assert ids == [read_provenance(tmp_path / "b")["run_id"]] != [twins]


def test_outcomes_are_shown_whole_on_a_narrow_terminal():
    console = Console(file=StringIO(), width=30)
    summary = {"steps": 20, "batch_size": 8, "minimum_validation_loss": 2.5, "seconds": 3.2}
    long_name = "table2-signum_adaptive-demo-seed0-batch_size.theta=0.5"
    finished = RunResult(long_name, "finished", summary=summary)
    report_results([finished, RunResult("b", "failed", "the loss is nan")], console)
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
    assert failure_reason(text, code) == expected


@pytest.mark.parametrize(("environment", "threads"), [({}, 4), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_runs_side_by_side_share_the_cores_that_the_job_has(
    environment, threads, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (run,) = planned(make(tmp_path, "a", launch=LaunchSettings(threads=None)))
    assert command(run, max_parallel=2)[-1] == f"launch.threads={threads}"


def test_runs_side_by_side_have_gpus_of_their_own():
    shares = [share_of_gpus(slot, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) for slot in (0, 1)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5", "6,7"]
    assert share_of_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": "4"}) == {}


def test_two_sweeps_that_share_a_finished_record_both_get_it(tmp_path, monkeypatch):
    twin = finish(make(tmp_path, "a"))
    (run,) = planned(make(tmp_path, "b"))
    write_summary = sweep.write_summary

    def the_other_is_faster(path, summary):
        monkeypatch.setattr(sweep, "write_summary", write_summary)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", os.getppid)  # another process
            assert skip_or_reuse(run, log=print).state == "shared"
        write_summary(path, summary)

    monkeypatch.setattr(sweep, "write_summary", the_other_is_faster)
    assert skip_or_reuse(run, log=print).state == "skipped"
    assert (run.directory / "metrics.jsonl").read_text() == (twin / "metrics.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_log_that_was_deleted_hides_no_result(tmp_path):
    log = tmp_path / "run.log"
    assert failure_reason(printed_since(log, 7), 1) == (
        "its log cannot be read: No such file or directory"
    )
    log.write_text("before\nerror: a reason\n")
    assert failure_reason(printed_since(log, 7), 1) == "a reason"
