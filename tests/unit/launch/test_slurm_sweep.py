"""What a sweep submits to SLURM; a list stands for the queue, a function for submitit."""

from pathlib import Path

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.launch import slurm_sweep
from gns_pretrain.launch.slurm_sweep import SlurmSettings, submit_runs
from gns_pretrain.launch.sweep import PlannedRun
from gns_pretrain.system import slurm
from gns_pretrain.system.slurm import read_submitted
from tests.settings import small_run

PLAIN = {
    "max_parallel": 8,
    "wait": False,
    "nodes": 1,
    "gpus_per_node": 8,
    "tasks_per_node": 8,
    "restarts_after_failure": 3,
}


@pytest.mark.parametrize("name", ["max_parallel", "nodes", "tasks_per_node"])
def test_setting_of_the_launcher_below_its_bound_is_named(name):
    with pytest.raises(InputError, match=f"hydra.launcher.{name}=0 must be at least 1"):
        SlurmSettings(**PLAIN | {name: 0})


def test_further_options_reach_sbatch_beside_ours():
    settings = SlurmSettings(
        **PLAIN, sbatch={"account": "lab", "qos": None, "additional_parameters": {"mail-type": "X"}}
    )
    parameters = settings.executor_parameters(Path("/logs"))
    assert parameters["account"] == "lab"
    assert "qos" not in parameters
    assert parameters["additional_parameters"] == {"requeue": True, "mail-type": "X"}
    teardown = "\n".join(parameters["teardown"])
    assert 'gns_pretrain.launch.requeue "$code" --at-most 3' in teardown


def planned(folder: Path, name: str) -> PlannedRun:
    config = small_run(folder, folder / "data", run_name=name)
    return PlannedRun((f"run_name={name}",), config, folder / name, "data")


@pytest.fixture
def queue(monkeypatch) -> dict[str, str]:
    """State of each job, by id."""
    states: dict[str, str] = {}
    monkeypatch.setattr(slurm_sweep, "job_states", lambda: states)
    monkeypatch.setattr(slurm, "job_states", lambda: states)
    return states


def test_run_in_the_queue_is_not_submitted_again(tmp_path, queue):
    runs = [planned(tmp_path, name) for name in "ab"]
    submitted = []

    def submit_array(ready, folder):
        submitted.extend(run.name for run in ready)
        return [f"12_{number}" for number, _ in enumerate(ready)]

    (first,) = submit_runs(runs[:1], submit_array, wait=False, log=print)
    assert (first.state, first.why) == ("submitted", "as job 12_0")
    queue["12_0"] = "PENDING"
    results = submit_runs(runs, submit_array, wait=False, log=print)
    assert [result.why for result in results] == ["in the queue as job 12_0", "as job 12_0"]
    assert submitted == ["a", "b"]
    assert len(read_submitted((tmp_path / "logs" / "slurm").resolve())) == 2


def test_run_whose_job_has_ended_without_a_summary_has_failed(tmp_path, queue):
    (result,) = submit_runs(
        [planned(tmp_path, "a")], lambda ready, folder: ["12"], wait=True, log=print
    )
    assert result.state == "failed"
    assert result.why == f"its log in {(tmp_path / 'logs' / 'slurm').resolve()} says why"
