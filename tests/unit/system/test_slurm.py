import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.system import slurm
from gns_pretrain.system.slurm import append_submitted, job_states, queued_runs, wait_for_jobs


@pytest.mark.parametrize(
    ("is_there", "answer", "states"),
    [
        (False, None, {}),
        (True, "", {}),
        (True, "14 12_1 RUNNING\n", {"12_1": "RUNNING", "14": "RUNNING"}),
        (True, None, None),  # a controller that is down or busy
    ],
)
def test_silence_is_no_empty_queue(is_there, answer, states, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: "/bin/squeue" if is_there else None)
    monkeypatch.setattr(slurm, "run_command", lambda *command: answer)
    assert job_states() == states


def test_nothing_is_submitted_while_the_queue_is_not_known(tmp_path):
    append_submitted(tmp_path, [tmp_path / "a", tmp_path / "b"], ["12", "13"])
    assert queued_runs(tmp_path, {"12": "PENDING"}) == {tmp_path / "a": "12"}
    with pytest.raises(InputError, match=r"squeue does not answer, .* none was submitted"):
        queued_runs(tmp_path, None)


def test_waiting_outlasts_a_silent_queue(monkeypatch):
    answers = [{"12": "RUNNING"}, None, None, {"12": "COMPLETING"}, {}]
    monkeypatch.setattr(slurm, "job_states", lambda: answers.pop(0))
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    said: list[str] = []
    wait_for_jobs(["12"], log=said.append)
    assert answers == []
    assert said == ["squeue does not answer; waiting until it does"]
