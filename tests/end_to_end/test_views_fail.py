"""Nobody who watches a run can stop it: neither the console nor a tracking service."""

import atexit
import multiprocessing.util
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from gns_pretrain.runs.directory import is_finished
from gns_pretrain.tracking import views
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import loop
from tests.end_to_end import commands


def print_to_a_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def print_to_a_pipe_that_is_closed() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


@pytest.mark.parametrize(
    ("lose", "ranks"), [(print_to_a_full_disk, 1), (print_to_a_pipe_that_is_closed, 2)]
)
def test_a_run_whose_output_is_lost_says_so_once_and_finishes(lose, ranks, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, f"launch.nproc_per_node={ranks}", steps=6)
    assert commands.run(words, tmp_path / "log", lose) == 0
    assert is_finished(tmp_path / "small")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("standard output is lost (")


def test_help_whose_reader_has_gone_ends_well(tmp_path):
    assert commands.run(["--help"], tmp_path / "log", print_to_a_pipe_that_is_closed) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


WAIT_SECONDS = 2.0


class BadCore:
    """Sabotage, for another process: a wandb-core that misbehaves.

    Args:
        folder: for the script that stands in its place.
        script: what the shell does; CORE is the real one, with its arguments.
        mode: of the file.
        hit: a signal that it gets after the fourth step.
    """

    def __init__(
        self, folder: Path, script: str, mode: int = 0o755, hit: int | None = None
    ) -> None:
        self.folder, self.script, self.mode, self.hit = folder, script, mode, hit

    def __call__(self) -> None:
        import wandb
        from wandb.sdk.lib.service import service_process

        core, number = self.folder / "core", self.folder / "number"
        body = self.script.replace("CORE", f'{wandb.util.get_core_path()} "$@"')
        core.write_text(f"#!/bin/sh\necho $$ > {number}\n{body}\n")
        core.chmod(self.mode)
        service_process.get_core_path = lambda: str(core)
        if self.hit is None:
            views.MayFail.__init__.__kwdefaults__["wait_seconds"] = WAIT_SECONDS
        # A child of the fork server leaves without the exit callbacks that a command has.
        multiprocessing.util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)
        one_step = loop.one_step

        def hit_and_step(run: loop.Run, log: loop.StepLog) -> list[loop.Reading]:
            if self.hit is not None and run.adaptive.steps == 4:
                if self.hit == signal.SIGSTOP:
                    run.record._views[-1]._wait_seconds = WAIT_SECONDS
                os.kill(int(number.read_text()), self.hit)
            return one_step(run, log)

        loop.one_step = hit_and_step


@pytest.mark.parametrize(
    ("script", "mode", "hit", "cause"),
    [
        ("exit 3", 0o755, None, "TimeoutError"),  # wandb 0.31 waits for itself then
        ("exec sleep 100", 0o755, None, "TimeoutError"),
        ("exec CORE", 0o644, None, "TimeoutError"),
        ("exec CORE", 0o755, signal.SIGKILL, "Connection"),
        ("exec CORE", 0o755, signal.SIGSTOP, "TimeoutError"),
    ],
)
def test_a_wandb_core_that_dies_or_hangs_holds_no_run(script, mode, hit, cause, tmp_path, shards):
    pytest.importorskip("wandb")
    words = commands.arguments(
        tmp_path, shards, "metrics=wandb", "metrics.wandb.mode=offline", steps=20
    )
    try:
        code = commands.run(words, tmp_path / "log", BadCore(tmp_path, script, mode, hit))
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):  # what a stop has left behind
            os.kill(int((tmp_path / "number").read_text()), signal.SIGKILL)
    assert code == 0
    lines = (tmp_path / "log").read_text().splitlines()
    (failure,) = (line for line in lines if "W&B failed and is left out from here on" in line)
    assert cause in failure
    assert "Traceback (most recent call last):" not in lines
    steps = [
        r["step"] for r in read_records(tmp_path / "small/metrics.jsonl") if r["kind"] == "train"
    ]
    assert steps == list(range(1, 21))
    assert is_finished(tmp_path / "small")
    # A process of its own has put the whole run in place of what the other one had.
    assert lines[-1].startswith("  summary")
    assert "W&B has been filled in from metrics.jsonl" in lines
    assert len(list((tmp_path / "small/wandb").glob("offline-run-*"))) == 1
