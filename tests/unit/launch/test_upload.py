import json
import subprocess
import sys
import threading

import pytest

from gns_pretrain.commands import upload_wandb
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch import upload as module
from gns_pretrain.launch.upload import upload
from gns_pretrain.runs.history import append_start, read_provenance, write_provenance
from gns_pretrain.runs.lock import locked
from gns_pretrain.system.processes import python_command, python_environment
from tests.unit.run_records import write_run
from tests.wandb_server import WandbServer


@pytest.fixture
def shown(monkeypatch):
    """What W&B is given, by run."""
    shown = {}

    class View:
        def __init__(self, directory, settings, *, config, run_id, log, records, replaces):
            if settings.project == "none":
                raise OSError("no such project")
            assert replaces
            shown[directory.name] = self.given = [settings.project, config, run_id]
            self.given += [record["step"] for record in records]

        def finish(self, summary):
            self.given.append(summary["steps"])

        def close(self, error):
            self.given.append("closed")

    monkeypatch.setattr(module, "WandbView", View)
    return shown


def make_run(folder, seed=0, **more):
    run = write_run(folder, "table2", "muon_small", [(1, 5.0), (4, 3.0)], seed=seed, **more)
    text = (run / "config.yaml").read_text()
    write_provenance(run, text + "metrics: {wandb: {project: study, group: null}}\n", "data")
    append_start(run, nodes=["n1", "n1"], gpu={})
    return run


def test_a_run_without_its_own_view_is_uploaded_with_its_settings_ranks_and_id(tmp_path, shown):
    run = make_run(tmp_path)
    assert upload(run, log=print) == 2
    project, config, run_id, *rest = shown[run.name]
    assert (project, config["cell"], config["run"]["num_ranks"]) == ("study", "muon_small", 2)
    assert rest == [1, 4, 4, "closed"]
    assert upload(run, log=print, changed={"project": "mine"}) == 2
    assert shown[run.name][0] == "mine"
    assert shown[run.name][2] == run_id  # the same run again


def test_a_run_that_trains_is_not_uploaded(tmp_path, shown, monkeypatch):
    monkeypatch.setattr("gns_pretrain.runs.lock.WAIT_SECONDS", 0.0)
    run = make_run(tmp_path, finished=False)
    with locked(run), pytest.raises(InputError, match="is in use"):
        upload(run, log=print)
    assert upload(run, log=print) == 2
    assert shown[run.name][3:] == [1, 4, "closed"]


def test_one_run_that_fails_hides_no_other(tmp_path, shown, monkeypatch, capsys):
    for seed in range(3):
        make_run(tmp_path, seed=seed)
    first, second, _ = sorted(tmp_path.iterdir())
    (first / "metrics.jsonl").write_text("damaged\n")
    (second / "config.yaml").write_text("metrics: {wandb: {project: none}}\n")
    monkeypatch.setattr(sys, "argv", ["upload-wandb", str(tmp_path)])
    with pytest.raises(TrainingError, match=r"2 of 3 runs are not uploaded"):
        upload_wandb.main()
    printed = capsys.readouterr().out
    assert f"{second} is not uploaded (OSError: no such project)" in printed
    assert "line 1 is damaged" in printed
    assert list(shown) == ["table2-muon_small-demo-seed2"]


def test_uploaded_again_a_run_gets_only_the_steps_that_are_missing(tmp_path):
    pytest.importorskip("wandb")
    run = make_run(tmp_path, finished=False)
    run_id = read_provenance(run)["run_id"]
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for steps in ([], [6, 8]):
            with (run / "metrics.jsonl").open("a") as file:
                for step in steps:
                    line = {"kind": "validation", "step": step, "tokens": 10 * step, "loss": 2.0}
                    file.write(json.dumps(line) + "\n")
            if steps:
                (run / "summary.json").write_text('{"state": "finished", "steps": 8}')
            command = python_command("gns_pretrain", "upload-wandb", str(run))
            done = subprocess.run(
                command,
                env=python_environment() | server.environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert (done.returncode, done.stdout) == (0, f"{run}: {2 + len(steps)} records\n")
        server.shutdown()
    assert [row["trainer/step"] for row in server.rows[run_id]] == [1, 4, 6, 8]
    assert [row["trainer/tokens"] for row in server.rows[run_id]] == [10, 40, 60, 80]
    assert server.exit_codes[run_id] == [1, 0]  # it was not finished at first
    assert json.loads(server.summaries[run_id])["final/steps"] == 8
