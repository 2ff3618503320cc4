import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.runs import lock as run_lock
from gns_pretrain.runs.lock import locked


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "DEAD_AFTER_SECONDS", 0.2)


def test_second_start_in_one_folder_is_refused_naming_the_first(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(InputError, match=f"in use by process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass


def test_holder_in_a_slurm_job_is_named_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu03")
    with (
        locked(tmp_path),
        pytest.raises(InputError, match=r"process \d+ on gpu03 \(SLURM job 77\)"),
        locked(tmp_path),
    ):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path):
    holder = (
        "import os, signal; from pathlib import Path\n"
        "from gns_pretrain.runs.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", holder], check=False)
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_left_in_good_order_the_file_names_nobody(tmp_path):
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""


def beating(monkeypatch, path: Path) -> None:
    """Let the holder's machine touch the file between two looks."""

    def beat(seconds: float) -> None:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))

    monkeypatch.setattr(run_lock.time, "sleep", beat)


def test_holder_on_another_machine_whose_beat_goes_on_is_refused_without_a_system_lock(
    tmp_path, monkeypatch
):
    lock = tmp_path / ".lock"
    lock.write_text("process 5 on elsewhere (SLURM job 12)\n")
    beating(monkeypatch, lock)
    with (
        pytest.raises(InputError, match=r"process 5 on elsewhere \(SLURM job 12\)"),
        locked(tmp_path),
    ):
        pass


def test_machine_whose_name_begins_with_ours_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    lock = tmp_path / ".lock"
    lock.write_text("process 5 on node10 (SLURM job 12)\n")
    beating(monkeypatch, lock)
    with pytest.raises(InputError, match="process 5 on node10"), locked(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_the_beat_tells_of_this_machine_too(
    tmp_path, monkeypatch
):
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    lock = tmp_path / ".lock"
    lock.write_text("process 5 on node1\n")
    with monkeypatch.context() as alive:
        beating(alive, lock)
        with pytest.raises(InputError, match="process 5 on node1"), locked(tmp_path):
            pass
    with locked(tmp_path):  # silent: gone
        assert f"process {os.getpid()} on node1" in lock.read_text()


def test_holder_on_another_machine_that_is_silent_is_gone(tmp_path):
    (tmp_path / ".lock").write_text("process 5 on elsewhere\n")
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_lock_file_that_was_removed_by_hand_still_lets_no_second_start_in(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(InputError, match="in use by"), locked(tmp_path):
            pass


def test_holder_restores_a_lock_file_that_was_removed_for_other_machines_to_see(tmp_path):
    with locked(tmp_path):
        name = (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").unlink()
        deadline = time.monotonic() + 60
        while not (tmp_path / ".lock").exists() or (tmp_path / ".lock").read_text() != name:
            assert time.monotonic() < deadline
            time.sleep(0.01)
