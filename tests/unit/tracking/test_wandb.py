import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.results.tables import make_table
from gns_pretrain.tracking.settings import WandbSettings
from gns_pretrain.tracking.views import series
from gns_pretrain.tracking.wandb import WandbView, tracked_runs
from tests.unit.run_records import configuration

# A run that trains, and is uploaded afterwards, twice.
RUN = """
import sys
from dataclasses import asdict
from pathlib import Path
import yaml
from gns_pretrain.launch.upload import upload
from gns_pretrain.runs.history import write_provenance
from gns_pretrain.tracking.jsonl import NoiseLine, TrainLine, ValidationLine
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings

wandb = WandbSettings(
    enabled=True, project="study", group="table2-muon", job_type="train", tags=["demo", "muon"],
    mode="offline",
)
directory = Path(sys.argv[1])
config = {"model": {"dim": 64}, "seed": 3, "metrics": {"wandb": asdict(wandb)}}
facts = {"run": {"num_ranks": None, "parameters": 1000}}
record = Record(
    directory, MetricsSettings(wandb=wandb), is_main=True, resume_step=0,
    config=config | facts, budget=300, run_id="0123abcd",
)
for step in (1, 2, 3):
    if step == 2:
        line = NoiseLine(
            step=2, geometry="manhattan", estimate="plug_in", noise=8.0, signal=2.0,
            noise_scale=4.0, noise_ema=6.0, signal_ema=2.0, noise_scale_ema=float("inf"),
            num_samples=8, seconds=0.01,
        )
        record.write(line)
    line = TrainLine(
        step=step, samples=8 * step, tokens=100 * step, loss=5.0 - step, lr=0.5, grad_norm=1.0,
        batch_size=8, micro_batch_size=4, accumulation=2, step_seconds=1.0, tokens_per_second=100.0,
    )
    record.write(line)
    record.write(ValidationLine(step=step, tokens=100 * step, loss=[4.5, 3.5, 4.0][step - 1]))
record.finish({"parameters": 1000})
record.close()
write_provenance(directory, yaml.safe_dump(config), "fingerprint")
(directory / "run.json").write_text('{"data_fingerprint": "f", "run_id": "0123abcd"}')
for _ in range(2):
    upload(directory, log=print)
"""


@cache
def inspect(run_file, *options):
    """W&B's own reader of a run file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run_file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """The .wandb file that a run of three steps wrote as it trained, in a process of its own."""
    if find_spec("wandb") is None:
        pytest.skip("needs wandb")
    directory = tmp_path_factory.mktemp("runs") / "table2-muon-seed3"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(directory), "--key=known-secret"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"SLURM_JOB_ID": "12", "SLURM_JWT": "known-secret"},
    )
    (directory / "printed").write_text(done.stdout)
    run_file, _ = sorted(directory.glob("wandb/replaced-offline-run-*/run-0123abcd.wandb"))
    return run_file


def test_an_upload_is_what_the_run_showed_as_it_trained(offline_run):
    (uploaded,) = offline_run.parents[1].glob("offline-run-*/run-0123abcd.wandb")

    def content(run_file):
        whole = json.loads(inspect(run_file, "--summary"))
        records = [json.loads(line) for line in inspect(run_file).splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        run = next(record["run"] for record in records if record["type"] == "run")
        run = {key: run[key] for key in ("run_id", "project", "run_group", "job_type", "tags")}
        for row in rows:
            del row["_timestamp"], row["_runtime"]
        for when in ("_timestamp", "_runtime", "_wandb"):
            whole["summary"].pop(when, None)
        whole["config"].pop("_wandb", None)
        metrics = [record["metric"] for record in records if record["type"] == "metric"]
        return run, rows, metrics, whole["config"], whole["summary"], whole["exit_code"]

    assert content(uploaded) == content(offline_run)


def test_an_offline_run_reads_back_with_identity_configuration_and_summary(offline_run):
    records = [json.loads(line) for line in inspect(offline_run).splitlines()]
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["project"] == "study"
    assert run["run_group"] == "table2-muon"
    assert run["job_type"] == "train"
    assert run["tags"] == ["demo", "muon"]
    assert run["display_name"] == "table2-muon-seed3"
    assert run["run_id"] == "0123abcd"

    whole = json.loads(inspect(offline_run, "--summary"))
    assert whole["state"] == "finished"
    assert whole["exit_code"] == 0
    assert whole["config"]["model"] == {"dim": 64}
    assert whole["config"]["seed"] == 3
    assert whole["summary"]["val/loss"] == {"min": 3.5}
    assert whole["summary"]["val/perplexity"]["min"] == pytest.approx(33.115, abs=1e-3)
    assert whole["summary"]["final/validation_loss"] == 4.0
    assert whole["summary"]["final/tokens"] == 300


def test_no_variable_and_no_argument_of_the_command_is_uploaded(offline_run):
    files = [path for path in offline_run.parent.rglob("*") if path.is_file()]
    assert offline_run in files
    assert [path for path in files if b"known-secret" in path.read_bytes()] == []


def test_every_row_of_an_offline_run_carries_step_tokens_and_samples(offline_run):
    records = [json.loads(line) for line in inspect(offline_run).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["trainer/step"] for row in rows] == [1, 2, 3]
    assert [row["trainer/tokens"] for row in rows] == [100, 200, 300]
    assert [row["trainer/samples"] for row in rows] == [8, 16, 24]
    assert [row["train/loss"] for row in rows] == [4.0, 3.0, 2.0]
    assert [row["val/loss"] for row in rows] == [4.5, 3.5, 4.0]
    assert rows[1]["val/perplexity"] == pytest.approx(33.115, abs=1e-3)  # e^3.5
    assert [row["train/batch_tokens"] for row in rows] == [100, 100, 100]
    # Measured before the training line of its step, and still in that step's row.
    assert rows[1]["noise/manhattan/plug_in/noise_scale"] == 4.0
    assert "noise/manhattan/plug_in/noise_scale_ema" not in rows[1]

    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    everything = next(metric for metric in metrics if metric.get("glob_name") == "*")
    assert everything["step_metric"] == "trainer/tokens"
    (losses,) = (metric for metric in metrics if metric.get("name") == "val/loss")
    assert losses["step_metric"] == "trainer/tokens"


def test_an_offline_run_ends_with_the_command_that_uploads_it(offline_run):
    printed = (offline_run.parents[2] / "printed").read_text().splitlines()
    folder = offline_run.parents[1]
    assert f"W&B: offline; upload with: wandb sync {folder}/offline-run-*" in printed
    assert len(list(folder.glob("offline-run-*"))) == 1


class NotingWandb(ModuleType):
    """A wandb that records its calls; rows without a step argument only."""

    def __init__(self):
        super().__init__("wandb")
        self.rows = []
        self.exit_codes = []
        self.summary = {}
        self.alerts = []
        self.offline = False
        self.Settings = dict

    def setup(self, settings):
        self.setup_settings = settings

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def define_metric(self, name, **arguments):
        pass

    def log(self, row):
        self.rows.append(row)

    def alert(self, **alert):
        self.alerts.append(alert)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def library(monkeypatch):
    library = NotingWandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


def open_view(directory, *, records=(), replaces=False, **settings):
    settings = WandbSettings(enabled=True, **settings)
    more = {"config": {}, "run_id": "id", "log": print, "records": records, "replaces": replaces}
    return WandbView(directory, settings, **more)


def validation(step):
    return {"kind": "validation", "step": step, "tokens": 10 * step, "loss": 0.0}


def test_login_start_and_end_wait_for_a_minute_at_most(library, tmp_path):
    open_view(tmp_path)
    assert 0 < library.setup_settings["login_timeout"] <= 60
    limits = library.arguments["settings"]
    assert 0 < limits["init_timeout"] <= 60
    assert 0 < limits["finish_timeout"] <= 60  # 0 would wait for ever
    assert limits["finish_timeout_raises"]


def test_a_chosen_name_goes_before_the_run_directory_and_ids_allow_resuming(library, tmp_path):
    open_view(tmp_path / "run-seed3", name="mine")
    assert library.arguments["name"] == "mine"
    assert library.arguments["id"] == "id"
    assert library.arguments["resume"] == "allow"
    open_view(tmp_path / "run-seed3")
    assert library.arguments["name"] == "run-seed3"


def test_a_run_that_stops_early_keeps_its_last_row_and_shows_as_failed(library, tmp_path):
    view = open_view(tmp_path)
    view.write(validation(5))
    view.close("step 6: the loss is nan")
    row = {"trainer/step": 5, "trainer/tokens": 50, "val/loss": 0.0, "val/perplexity": 1.0}
    assert library.rows == [row]
    assert library.exit_codes == [1]
    (alert,) = library.alerts
    assert (alert["level"], alert["text"]) == ("ERROR", "step 6: the loss is nan")


def test_a_finished_run_shows_as_finished(library, tmp_path):
    view = open_view(tmp_path)
    view.finish({"tokens": 50})
    view.close()
    assert library.exit_codes == [0]
    assert library.alerts == []
    assert library.summary == {"final/tokens": 50}


def test_a_resumed_run_logs_what_w_and_b_lacks_and_nothing_twice(library, tmp_path):
    library.summary["trainer/step"] = 5  # as it hands it back
    records = [validation(step) for step in (4, 5, 6)]
    view = open_view(tmp_path, records=records)
    for step in (5, 7):
        view.write(validation(step))
    view.finish({})
    assert [row["trainer/step"] for row in library.rows] == [6, 7]


def test_offline_only_an_upload_repeats_what_was_recorded(library, tmp_path):
    library.offline = True
    for replaces in (False, True):
        view = open_view(tmp_path, records=[validation(4)], replaces=replaces)
        view.write(validation(5))
        view.close()
    assert [row["trainer/step"] for row in library.rows] == [5, 4, 5]


def test_offline_files_that_were_synced_are_not_replaced(library, tmp_path):
    library.offline = True
    folder = tmp_path / "wandb" / "offline-run-1-id"
    folder.mkdir(parents=True)
    (folder / "run-id.wandb.synced").touch()
    with pytest.raises(InputError, match="upload what is missing online"):
        open_view(tmp_path, replaces=True)
    assert folder.exists()


def test_a_run_is_grouped_with_those_of_other_seeds(library, tmp_path, monkeypatch):
    open_view(tmp_path / "table2-muon-seed3")
    assert library.arguments["group"] == "table2-muon"
    open_view(tmp_path / "table2-muon-seed3", group="mine")
    assert library.arguments["group"] == "mine"
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    open_view(tmp_path / "table2-muon-seed3")
    assert library.arguments["group"] is None


def test_a_record_of_an_earlier_version_shows_what_it_has():
    old = {"kind": "train", "step": 1, "tokens": 80, "loss": None, "lr": 0.1}
    assert series(old) == {"train/lr": 0.1}
    assert series({"kind": "validation", "step": 1, "loss": 1000.0}) == {"val/loss": 1000.0}


class RemoteRun:
    """A run as wandb's public API hands it out."""

    def __init__(self, name, *, state="finished", steps=4, history=(), **config):
        self.name, self.state, self.config = name, state, config
        self.summary = {} if steps is None else {"final/steps": steps}
        self.history = history

    def scan_history(self, keys):
        assert keys == ["trainer/step", "val/loss"]
        return iter(dict(zip(keys, row, strict=True)) for row in self.history)


class Reader(ModuleType):
    """A wandb whose server holds these runs, or is not to be reached."""

    class Error(Exception):
        """As wandb's own."""

    def __init__(self, runs=(), error=None):
        super().__init__("wandb")
        self.held, self.error, self.asked = runs, error, None

    def Api(self, timeout):  # noqa: N802
        assert 0 < timeout <= 60
        return self

    def runs(self, project, **asked):
        self.asked = (project, asked["filters"])
        if self.error:
            raise self.error
        return iter(self.held)


def test_a_projects_runs_are_read_with_their_settings_and_evaluations(monkeypatch):
    runs = [
        RemoteRun("a", history=[(1, 5.0), (4, 3.0)], seed=3, scale={"name": "demo"}),
        RemoteRun("b", state="running", steps=None),
        RemoteRun("c", state="crashed", steps=7),
    ]
    server = Reader(runs)
    monkeypatch.setitem(sys.modules, "wandb", server)
    read = tracked_runs("team/study", filters={"config.table": "table2"})
    assert server.asked == ("team/study", {"config.table": "table2"})
    assert [(run.name, run.finished) for run in read] == [("a", True), ("b", False), ("c", False)]
    assert read[0].config == {"seed": 3, "scale": {"name": "demo"}}
    assert read[0].steps == 4
    assert read[0].validation() == [(1, 5.0), (4, 3.0)]


def test_steps_that_a_resumed_run_logged_again_count_once(monkeypatch):
    history = [(1, 5.0), (2, 4.0), (3, 3.5), (2, 4.1), (4, 3.0)]
    monkeypatch.setitem(sys.modules, "wandb", Reader([RemoteRun("a", history=history)]))
    (run,) = tracked_runs("study")
    assert run.validation() == [(1, 5.0), (2, 4.1), (4, 3.0)]


@pytest.mark.parametrize("error", [ValueError, Reader.Error, OSError])
def test_a_project_that_cannot_be_read_is_reported_in_one_line(monkeypatch, error):
    monkeypatch.setitem(sys.modules, "wandb", Reader(error=error("no such project.\nTraceback")))
    with pytest.raises(
        InputError, match=r"project team/x cannot be read \(no such project\)"
    ) as no:
        tracked_runs("team/x")
    assert "\n" not in str(no.value)


def test_a_table_is_read_from_w_and_b_as_from_folders(monkeypatch):
    def remote(cell, seed, steps, *history):
        return RemoteRun(
            f"{cell}-{seed}",
            steps=steps,
            history=history,
            **configuration("table2", cell, seed=seed),
        )

    runs = [
        remote("muon_small", 0, 100, (80, 4.0), (100, 4.5)),
        remote("muon_adaptive", 0, 50, (20, 4.0), (50, 3.0)),
        RemoteRun("late", state="running", **configuration("table2", "muon_adaptive", seed=1)),
    ]
    monkeypatch.setitem(sys.modules, "wandb", Reader(runs))
    table = make_table("table2", project="team/study")
    muon = next(entries for labels, entries in table.rows if labels == ["Muon"])
    values = [entry.statistic and entry.statistic.value for entry in muon]
    assert values == [4.0, None, None, 3.0, 75.0, 75.0, 50.0]
    assert "not counted, unfinished: late" in table.notes


def test_what_the_user_has_set_for_wandb_itself_is_left_to_it(library, tmp_path, monkeypatch):
    open_view(tmp_path / "run")
    assert library.arguments["mode"] is None
    assert library.arguments["project"] == "gns-pretrain"
    assert library.arguments["tags"] is None
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(variable, "mine")
    open_view(tmp_path / "run")
    assert library.arguments["project"] is library.arguments["name"] is None
    open_view(tmp_path / "run", project="given", mode="offline")
    assert (library.arguments["project"], library.arguments["mode"]) == ("given", "offline")
