"""Nobody who watches a run can stop it: neither the console nor a tracking service."""

import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from gns_pretrain.runs.directory import is_finished
from gns_pretrain.tracking import views
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


class SilentWandb(ModuleType):
    """A wandb whose process never answers: one call of it does not return."""

    def __init__(self, silent: str) -> None:
        super().__init__("wandb")
        self.silent, self.Settings, self.summary = silent, dict, {}

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **keywords):
            if name == self.silent:
                threading.Event().wait()
            return self

        return call


def silent_wandb(call: str) -> None:
    import atexit

    sys.modules["wandb"] = SilentWandb(call)
    views.WAIT_SECONDS = 0.5
    views.MayFail.__init__.__kwdefaults__["wait_seconds"] = 0.5
    atexit.register(threading.Event().wait)  # as wandb's own callback, which waits for its process


@pytest.mark.parametrize("call", ["setup", "finish"])
def test_a_tracking_service_that_never_answers_holds_no_run(call, tmp_path, shards):
    words = commands.arguments(tmp_path, shards, "metrics=wandb", steps=6)
    began = time.monotonic()
    assert commands.run(words, tmp_path / "log", SilentCall(call)) == 0
    assert time.monotonic() - began < commands.PATIENCE_SECONDS
    assert is_finished(tmp_path / "small")
    log = Path(tmp_path / "log").read_text()
    assert log.count("W&B failed and is left out from here on") == 1
    assert "TimeoutError: no answer in" in log


class SilentCall:
    """Sabotage, for another process: `silent_wandb` of one call."""

    def __init__(self, call: str) -> None:
        self.call = call

    def __call__(self) -> None:
        silent_wandb(self.call)
