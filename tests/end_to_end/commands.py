"""`python train.py ...` as a user types it, in a process forked from one that has torch loaded."""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gns_pretrain.launch import train as launch
from gns_pretrain.training import loop
from tests.distributed.harness import CONTEXT
from tests.settings import SEQUENCE_LENGTH

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120
GATE = "gate"
HELD = "held"


def arguments(folder: Path, data: Path, *more: str, steps: int = 20) -> list[str]:
    """The command line of the small run of tests/settings.py."""
    tokens = 8 * SEQUENCE_LENGTH
    return [
        "run_name=small",
        f"output_directory={folder}",
        f"token_budget={steps * tokens}",
        "micro_batch_size=2",
        "batch_size.initial=8",
        "model.dim=18",
        "model.num_layers=2",
        "model.num_heads=3",
        "model.num_kv_heads=1",
        "model.ffn_dim=26",
        f"data.path={data}",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        "optimizer.lr=1e-2",
        f"evaluation.every_tokens={10 * tokens}",
        "evaluation.num_sequences=7",
        "checkpoint.every_steps=5",
        "metrics.log_every=3",
        "metrics.progress=never",
        "launch.device=cpu",
        "launch.threads=1",
        *more,
    ]


def start(words: list[str], log: Path, sabotage: Callable[[], None] | None = None) -> BaseProcess:
    """Start the command; what it prints goes to `log`; `sabotage` runs in it first."""
    process = CONTEXT.Process(target=command, args=(words, log, sabotage))
    process.start()
    return process


def start_and_hold(
    words: list[str], folder: Path, *, after_step: int, name: str = "small"
) -> BaseProcess:
    """Start the command; return when it has told of a step, and takes none until `let_go`.

    A run this small could be over before a signal is sent to it. What it began to save is written.
    """
    (folder / HELD).unlink(missing_ok=True)
    hold = partial(hold_after, after_step, folder / GATE)
    process = start(words, folder / "log", hold)
    wait_for_line(folder / name / "metrics.jsonl", after_step, process)
    wait_for_file(folder / HELD, process)
    return process


def let_go(folder: Path) -> None:
    """Let a command that is held go on."""
    (folder / GATE).touch()


def hold_after(step: int, gate: Path) -> None:
    """Sabotage: this command and the ranks it starts begin no step after `step` before `gate`."""
    hold_steps(step, gate)
    run_local_ranks = launch.run_local_ranks
    launch.run_local_ranks = lambda _, arguments, n: run_local_ranks(
        run_held_rank, (step, gate, *arguments), n
    )


def run_held_rank(step: int, gate: Path, *arguments: Any) -> None:
    """A rank that the command starts, held as the command is."""
    hold_steps(step, gate)
    launch.run_started_rank(*arguments)


def hold_steps(step: int, gate: Path) -> None:
    """Hold this process's training before the step after `step`."""
    one_step = loop.one_step

    def held_step(run: loop.Run, log: loop.StepLog) -> list[loop.Reading]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        if run.adaptive.steps == step and run.world.is_main:
            run.checkpoints.wait()
            gate.with_name(HELD).touch()
        while run.adaptive.steps == step and not gate.exists():
            assert time.monotonic() < deadline, f"nobody has opened {gate}"
            time.sleep(0.01)
        return one_step(run, log)

    loop.one_step = held_step


def run(words: list[str], log: Path, sabotage: Callable[[], None] | None = None) -> int:
    """Run the command to its end; returns its exit code, negative for a signal."""
    return finish(start(words, log, sabotage))


def finish(process: BaseProcess) -> int:
    """Wait for a command that was started; returns its exit code."""
    process.join(PATIENCE_SECONDS)
    if process.exitcode is None:
        kill_group(process)
        raise AssertionError(f"the command did not end in {PATIENCE_SECONDS} s")
    return process.exitcode


def command(words: list[str], log: Path, sabotage: Callable[[], None] | None) -> None:
    """The process itself: its own group, so that a test can kill it with all its ranks."""
    os.setpgid(0, 0)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if sabotage:
        sabotage()
    os.chdir(ROOT)
    sys.argv = ["train.py", *words]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def kill_group(process: BaseProcess) -> None:
    """SIGKILL the command and every rank it has started."""
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def kill_alone(process: BaseProcess) -> None:
    """SIGKILL the command and none of the ranks it has started."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def wait_for_file(path: Path, process: BaseProcess) -> None:
    """Return once a file is there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert process.is_alive(), f"the command ended before {path} came"
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def wait_for_line(metrics: Path, step: int, process: BaseProcess) -> None:
    """Return once the training line of `step` has been written."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    wanted = f'"kind":"train","step":{step},'
    while True:
        alive = process.is_alive()  # before reading: its last line may come with its end
        if metrics.exists() and wanted in metrics.read_text().replace(" ", ""):
            return
        assert alive, "the command ended before that step"
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.01)
