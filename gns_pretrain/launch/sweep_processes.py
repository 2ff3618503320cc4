"""The runs of a sweep as processes of this machine, one after another or a few at once.

Each is the command that a person would type, so one that dies takes no other with it. What it
prints goes to `<output_directory>/logs/<run_name>.log`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gns_pretrain.launch.sweep import Job, Outcome, settle
from gns_pretrain.launch.train import EXIT_FINISHED
from gns_pretrain.runs.directory import read_summary
from gns_pretrain.system.processes import EXIT_STOPPED, STOP_SIGNALS, threads_of_each
from gns_pretrain.tracking.jsonl import last_record

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
LOOKS_PER_SECOND = 4
QUOTED_CHARACTERS = 300  # of the line that says why a run failed


@dataclass
class Running:
    """A run in its process.

    Args:
        slot: its place among those that run at once.
        log_start: bytes of its log that earlier attempts wrote.
        asked: whether it was asked to stop.
    """

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    slot: int
    log_start: int = 0
    asked: bool = False


class Stopping:
    """Whether somebody asked the sweep to stop."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        self.requested = True


def run_jobs(jobs: Sequence[Job], *, at_once: int, console: Console) -> list[Outcome]:
    """Train every run that is not finished; one that fails stops no other.

    Args:
        jobs: of `plan_jobs`.
        at_once: runs side by side; they share the cores, or have their own share of the GPUs.
        console: for a line a run, and the progress of all on a terminal.

    Returns:
        The outcome of each, in order. Asked to stop, those under way are saved first; the others
        are stopped too.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = list(jobs)
    running: list[Running] = []
    with (
        asked_to_stop() as stopping,
        shown_progress(console) as progress,
        none_left_behind(running),
    ):
        bar = progress.add_task("", total=sum(job.config.token_budget for job in jobs))
        while waiting or running:
            while waiting and len(running) < at_once and not stopping.requested:
                job = waiting.pop(0)
                if settled := settle(job, say=console.print):
                    outcomes[job.name] = settled
                    tell(console, outcomes, len(jobs), settled)
                    continue
                slot = min(set(range(at_once)) - {other.slot for other in running})
                running.append(start(job, slot=slot, at_once=at_once))
            if stopping.requested:
                ask_to_stop(running)
                outcomes |= {
                    job.name: Outcome(job.name, "stopped", "not started") for job in waiting
                }
                waiting = []
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                outcomes[run.job.name] = outcome(run)
                tell(console, outcomes, len(jobs), outcomes[run.job.name])
            show(progress, bar, jobs, outcomes, running)
            time.sleep(1 / LOOKS_PER_SECOND)
    return [outcomes[job.name] for job in jobs]


def ask_to_stop(running: Sequence[Running]) -> None:
    """Ask runs to save and leave; each once, since one that still loads dies of a second."""
    for run in running:
        if not run.asked:
            run.process.send_signal(signal.SIGTERM)
            run.asked = True


@contextmanager
def none_left_behind(running: Sequence[Running]) -> Iterator[None]:
    """An error of the sweep itself lets no run go on unwatched."""
    try:
        yield
    except BaseException:
        ask_to_stop(running)
        raise


def start(job: Job, *, slot: int, at_once: int) -> Running:
    """Start a run's own command."""
    log = job.directory.parent / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        written = file.tell()
        process = subprocess.Popen(
            command(job, at_once=at_once),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **share_of_gpus(slot, at_once, os.environ)},
            start_new_session=True,  # Ctrl-C is for the sweep, which asks its runs to stop
        )
    return Running(job, process, log, slot, log_start=written)


def command(job: Job, *, at_once: int) -> list[str]:
    """`python train.py ...` for one run; side by side, each has its share of the cores."""
    words = [sys.executable, str(TRAIN), "hydra.mode=RUN", *job.overrides]
    if at_once > 1 and job.config.launch.threads is None:
        ranks = job.config.launch.nproc_per_node
        words.append(f"launch.threads={threads_of_each(at_once * ranks)}")
    return words


def share_of_gpus(slot: int, at_once: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The GPUs of one of several runs side by side; all of them where there are too few."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    share = len(gpus) // at_once
    if at_once == 1 or share == 0:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * share : (slot + 1) * share])}


def outcome(run: Running) -> Outcome:
    """What became of a run whose process has ended."""
    code = run.process.returncode
    if code == EXIT_FINISHED:
        return Outcome(run.job.name, "finished", summary=read_summary(run.job.directory))
    if code == EXIT_STOPPED:
        fresh = run.job.config.resume == "never"
        way_on = f"run_name={run.job.name} resume=auto goes" if fresh else "the same sweep goes"
        return Outcome(run.job.name, "stopped", f"saved; {way_on} on from there")
    if run.asked and code == -signal.SIGTERM:  # it was still loading
        return Outcome(run.job.name, "stopped", "not started")
    why = reason(run.log.read_bytes()[run.log_start :].decode(errors="replace"), code)
    return Outcome(run.job.name, "failed", f"{why} ({run.log})")


def reason(printed: str, code: int) -> str:
    """The line of what a run printed that says why it failed."""
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1][:QUOTED_CHARACTERS]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (lines[-1] if lines else f"exit code {code}")[:QUOTED_CHARACTERS]


@contextmanager
def asked_to_stop() -> Iterator[Stopping]:
    """Note the signals that ask to stop, instead of dying of them."""
    stopping = Stopping()
    before = {number: signal.signal(number, stopping.note) for number in STOP_SIGNALS}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """A bar over the tokens of all runs; nothing where the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield progress


def show(
    progress: Progress,
    bar: TaskID,
    jobs: Sequence[Job],
    outcomes: Mapping[str, Outcome],
    running: Sequence[Running],
) -> None:
    """Move the bar to where the runs are."""
    if progress.disable:
        return
    tokens = sum(job.config.token_budget for job in jobs if job.name in outcomes)
    under_way = []
    for run in running:
        done = last_record(run.job.directory / "metrics.jsonl").get("tokens", 0)
        tokens += min(done, run.job.config.token_budget)
        under_way.append(f"{run.job.name} {done / run.job.config.token_budget:.0%}")
    description = f"{len(outcomes)}/{len(jobs)} runs | {', '.join(under_way)}"
    progress.update(bar, completed=tokens, description=description)


def tell(console: Console, outcomes: Mapping[str, Outcome], total: int, last: Outcome) -> None:
    """One line for a run that has ended."""
    loss = ""
    if last.summary:
        loss = f": lowest validation loss {last.summary['minimum_validation_loss']:.4f}"
    why = f": {last.why}" if last.why and last.state != "finished" else loss
    line = f"[{len(outcomes)}/{total}] {last.name} {last.state}{why}"
    console.print(line, soft_wrap=True, markup=False, highlight=False)
