import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.launch import status as submissions
from gns_pretrain.launch.status import Submission, note_submissions, queued, wait_until_ended
from gns_pretrain.system import slurm
from gns_pretrain.system.slurm import job_states


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
    monkeypatch.setattr(slurm, "ask", lambda *command: answer)
    assert job_states() == states


def test_nothing_is_submitted_while_the_queue_is_not_known(tmp_path):
    note_submissions(tmp_path, [Submission(tmp_path / "a", "12"), Submission(tmp_path / "b", "13")])
    assert queued(tmp_path, {"12": "PENDING"}) == {tmp_path / "a": "12"}
    with pytest.raises(InputError, match=r"squeue does not answer, .* none was submitted"):
        queued(tmp_path, None)


def test_waiting_outlasts_a_silent_queue(monkeypatch):
    answers = [{"12": "RUNNING"}, None, None, {"12": "COMPLETING"}, {}]
    monkeypatch.setattr(submissions, "job_states", lambda: answers.pop(0))
    monkeypatch.setattr(submissions, "LOOK_EVERY_SECONDS", 0.0)
    said: list[str] = []
    wait_until_ended(["12"], say=said.append)
    assert answers == []
    assert said == ["squeue does not answer; waiting until it does"]
