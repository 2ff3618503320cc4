import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gns_pretrain.errors import TrainingError
from gns_pretrain.launch import crash_report
from gns_pretrain.launch.crash_report import (
    CrashReporter,
    is_consequence,
    read_crash_reports,
    traces,
)
from gns_pretrain.runs.history import read_starts


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(crash_report, "HEAD_START_SECONDS", 0.0)
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "chosen by the user")


@pytest.fixture
def reporters(tmp_path):
    """Ranks of one start, whose folder is tmp_path; the process's own signals come back."""
    before = signal.getsignal(signal.SIGTERM)
    ranks = [CrashReporter(rank, tmp_path) for rank in range(3)]
    yield ranks
    ranks[-1].close()
    faulthandler.enable(sys.__stderr__)
    signal.signal(signal.SIGTERM, before)


def fail(reporter: CrashReporter, error: Exception) -> None:
    with reporter.capture():
        raise error


def test_root_cause_is_named_before_the_ranks_it_took_along(reporters, tmp_path, capsys):
    first, second, third = reporters
    first.set_run_directory(tmp_path / "run")
    with pytest.raises(SystemExit):
        fail(first, RuntimeError("Connection closed by peer [n2]:1"))
    assert "rank 0: another rank is gone or silent" in capsys.readouterr().out
    with pytest.raises(KeyError):
        fail(second, KeyError("missing"))
    with pytest.raises(ValueError, match="later"):
        fail(third, ValueError("later"))
    report = read_crash_reports(tmp_path)
    assert report.cause.startswith("rank 1 (process ")
    assert report.cause.endswith("KeyError: 'missing'")
    assert report.text.splitlines()[1] == "Traceback (most recent call last):"
    assert report.text.endswith("2 more failed after it")
    assert report.run_directory == (tmp_path / "run").resolve()


def test_silent_rank_is_named_with_the_stack_where_it_hung(reporters, tmp_path):
    for rank in (0, 2):
        with pytest.raises(SystemExit):
            fail(reporters[rank], RuntimeError("Timed out waiting 5000ms for recv"))
    stack = 'Stack (most recent call first):\n  File "faulty.py", line 3 in hang_forever\n'
    (tmp_path / "rank_00001.stack").write_text(stack)
    report = read_crash_reports(tmp_path)
    assert report.cause.startswith("rank 1 (process ")
    assert "left no error: killed from outside" in report.cause
    assert "was here at its end:\nStack" in report.text


def test_rank_that_gets_sigterm_leaves_its_stack(tmp_path):
    program = (
        "import os, signal; from pathlib import Path\n"
        "from gns_pretrain.launch.crash_report import CrashReporter\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('noted'))\n"
        f"reporter = CrashReporter(0, Path({str(tmp_path)!r}))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "reporter.close()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (answer.returncode, answer.stdout) == (0, "noted\n"), answer.stderr
    assert 'File "<string>", line 5' in (tmp_path / "rank_00000.stack").read_text()


def test_rank_that_crashed_is_named_before_those_that_waited_for_it(reporters, tmp_path):
    (tmp_path / "rank_00000.stack").write_text("Fatal Python error: Aborted\n\nStack ...")
    (tmp_path / "rank_00001.stack").write_text("Fatal Python error: Segmentation fault\n\nStack")
    (tmp_path / "rank_00002.stack").write_text("Fatal Python error: Aborted\n\nStack ...")
    report = read_crash_reports(tmp_path)
    assert report.cause.startswith("rank 1 (process ")
    assert report.cause.endswith("Fatal Python error: Segmentation fault")


def test_rank_that_hung_is_named_before_those_that_the_watchdog_aborted(reporters, tmp_path):
    for rank in (0, 2):
        (tmp_path / f"rank_0000{rank}.stack").write_text("Fatal Python error: Aborted\n\nStack")
    (tmp_path / "rank_00001.stack").write_text("Stack (most recent call first):\n  in read")
    report = read_crash_reports(tmp_path)
    assert report.cause.startswith("rank 1 (process ")
    assert "left no error" in report.cause
    assert report.text.splitlines()[1].startswith("rank 1 (process ")


def test_abort_leaves_a_stack(tmp_path):
    program = (
        "import os; from pathlib import Path\n"
        "from gns_pretrain.launch.crash_report import CrashReporter\n"
        f"reporter = CrashReporter(0, Path({str(tmp_path)!r}))\n"
        "os.abort()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    stack = (tmp_path / "rank_00000.stack").read_text()
    assert stack.startswith("Fatal Python error: Aborted")
    assert 'File "<string>", line 4' in stack


def test_without_a_folder_too_a_consequence_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        fail(CrashReporter(0, None), RuntimeError("Connection closed by peer"))
    assert ended.value.code == 1
    line = "rank 0: another rank is gone or silent (RuntimeError: Connection closed by peer)\n"
    assert capsys.readouterr().out == line
    with pytest.raises(KeyError):
        fail(CrashReporter(0, None), KeyError("missing"))


def test_rank_that_is_alone_loses_nobody():
    with pytest.raises(RuntimeError, match="timed out"):
        fail(CrashReporter(0, None, alone=True), RuntimeError("timed out"))


def recorded_end(reporter: CrashReporter, folder, error: Exception) -> dict:
    reporter.set_run_directory(folder)
    reporter.record_failure(error)
    return next(iter(read_starts(folder)[-1:]), {})


def test_failure_is_recorded_in_the_runs_history_by_rank_0(tmp_path):
    error = TrainingError("step 5: the loss is nan")
    assert recorded_end(CrashReporter(1, None, alone=True), tmp_path, error) == {}
    end = recorded_end(CrashReporter(0, None, alone=True), tmp_path, error)
    assert end["error"] == "step 5: the loss is nan"
    end = recorded_end(CrashReporter(0, None), tmp_path, ValueError("first line\nsecond"))
    assert (end["outcome"], end["error"]) == ("failed", "ValueError: first line")


def test_consequence_is_left_to_the_batch_script_where_one_collects_the_reports(
    reporters, tmp_path
):
    lost = RuntimeError("Connection closed by peer")
    assert recorded_end(reporters[0], tmp_path, lost) == {}
    assert recorded_end(CrashReporter(0, None), tmp_path, lost)["error"].startswith(
        "another rank is gone"
    )


def test_job_that_never_came_to_a_run_says_so(tmp_path):
    assert read_crash_reports(tmp_path).cause == "no rank came as far as to start a run"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("CUDA out of memory"), False),
        (OSError("Broken pipe"), False),
    ],
)
def test_consequences_are_errors_of_the_collectives(error, expected):
    assert is_consequence(error) is expected


def test_torchs_flight_record_goes_to_the_run_directory_unless_set_and_is_named(
    reporters, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)  # other runs of this process
    reporters[0].set_run_directory(run)
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")  # so that it is unset again afterwards
    monkeypatch.delenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    reporters[0].set_run_directory(run)
    prefix = os.environ["TORCH_FR_DUMP_TEMP_FILE"]
    old, new = Path(f"{prefix}0"), Path(f"{prefix}1")  # as torch names them
    old.write_bytes(b"of an earlier start")
    os.utime(old, (0, 0))
    new.write_bytes(b"record")
    report = read_crash_reports(tmp_path)
    assert report.text.endswith(f"where ranks were: {new}")


def test_a_rank_without_a_job_leaves_its_stack_in_the_run_directory_if_it_is_killed(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gns_pretrain.launch.crash_report import CrashReporter\n"
        "reporter = CrashReporter(int(sys.argv[1]), None)\n"
        f"reporter.set_run_directory(Path({str(tmp_path)!r}))\n"
        "if sys.argv[1] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "reporter.close()\n"
    )
    began = time.time() - 1
    for rank in "01":
        subprocess.run([sys.executable, "-c", program, rank], check=False)
    (stack,) = tmp_path.glob("rank_*")  # the other one ended by itself
    assert 'File "<string>", line 6' in stack.read_text()
    assert traces(tmp_path, since=began) == f"where ranks were: {stack}"
    assert traces(tmp_path, since=time.time() + 1) == ""
