"""The runs of a sweep as processes of this machine, one after another or a few in parallel.

Each is the command that a user would type, so one that dies takes no other with it. What it prints
goes to `<output_directory>/logs/<run_name>.log`.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gns_pretrain.errors import EXIT_FINISHED, EXIT_STOPPED
from gns_pretrain.launch.sweep import PlannedRun, RunResult, print_line, skip_or_reuse
from gns_pretrain.runs.directory import METRICS, read_summary
from gns_pretrain.system.processes import StopRequest, threads_per_process
from gns_pretrain.tracking.jsonl import last_record

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
UPDATE_SECONDS = 0.25  # between updates of the progress bar, and looks at a request to stop
MAX_QUOTED = 300  # characters of the line that says why a run failed


class RunProcess:
    """A run's own command, started in a slot of `max_parallel`."""

    def __init__(self, run: PlannedRun, *, slot: int, max_parallel: int) -> None:
        self.run = run
        self.stop_sent = False
        self.log = run.directory.parent / "logs" / f"{run.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as file:
            self.log_start = file.tell()  # after what earlier attempts have printed
            self.process = subprocess.Popen(
                command(run, max_parallel=max_parallel),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **share_of_gpus(slot, max_parallel, os.environ)},
                start_new_session=True,  # Ctrl-C is for the sweep, which stops its runs
            )

    def stop(self) -> None:
        """Ask the run to save and exit; once, since one that is still loading dies of a second."""
        if not self.stop_sent:
            self.stop_sent = True
            self.process.send_signal(signal.SIGTERM)

    def result(self) -> RunResult:
        """Wait for the end."""
        code, run = self.process.wait(), self.run
        if code == EXIT_FINISHED:
            return RunResult(run.name, "finished", summary=read_summary(run.directory))
        if code == EXIT_STOPPED:
            hint = "the same sweep resumes it"
            if run.config.resume == "never":
                hint = f"run_name={run.name} resume=auto resumes it"
            return RunResult(run.name, "stopped", f"saved; {hint}")
        if self.stop_sent and code == -signal.SIGTERM:  # it was still loading
            return RunResult(run.name, "stopped", "not started")
        printed = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        return RunResult(run.name, "failed", f"{failure_reason(printed, code)} ({self.log})")


def train_runs(
    runs: Sequence[PlannedRun], *, max_parallel: int, console: Console
) -> list[RunResult]:
    """Train every run that is not finished; one that fails stops no other.

    Args:
        runs: of `plan_runs`.
        max_parallel: runs in parallel; they share the cores, and have their own share of the GPUs.
        console: for a line a run, and the progress of all on a terminal.

    Returns:
        The result of each, in order. After a request to stop, those that are running are saved
        first; the others are stopped too.
    """
    waiting = deque(runs)
    running: dict[int, RunProcess] = {}  # by slot
    results: dict[Path, RunResult] = {}
    log = partial(print_line, console)

    def end(run: PlannedRun, result: RunResult) -> None:
        results[run.directory] = result
        detail = f": {result.why}" if result.why else ""
        if result.summary and result.state == "finished":
            detail = f": lowest validation loss {result.summary['minimum_validation_loss']:.4f}"
        log(f"[{len(results)}/{len(runs)}] {result.name} {result.state}{detail}")

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with StopRequest().listening() as stop, progress:
        bar = progress.add_task("", total=sum(run.config.token_budget for run in runs))
        try:
            while waiting or running:
                for slot in range(max_parallel):
                    if slot in running and running[slot].process.poll() is not None:
                        ended = running.pop(slot)
                        end(ended.run, ended.result())
                    while waiting and slot not in running:
                        run = waiting.popleft()
                        if stop.requested:
                            end(run, RunResult(run.name, "stopped", "not started"))
                        elif result := skip_or_reuse(run, log=log):
                            end(run, result)
                        else:
                            running[slot] = RunProcess(run, slot=slot, max_parallel=max_parallel)
                if stop.requested:
                    for process in running.values():
                        process.stop()
                if not progress.disable:
                    tokens, description = tokens_done(runs, results, running.values())
                    progress.update(bar, completed=tokens, description=description)
                if running:
                    time.sleep(UPDATE_SECONDS)
        finally:  # an error of the sweep itself leaves no run behind
            for process in running.values():
                process.stop()
            for process in running.values():
                process.process.wait()
    return [results[run.directory] for run in runs]


def command(run: PlannedRun, *, max_parallel: int) -> list[str]:
    """`python train.py ...` for one run; in parallel, each has its share of the cores."""
    words = [sys.executable, str(TRAIN), "hydra.mode=RUN", *run.overrides]
    if max_parallel > 1 and run.config.launch.threads is None:
        ranks = run.config.launch.nproc_per_node
        words.append(f"launch.threads={threads_per_process(max_parallel * ranks)}")
    return words


def share_of_gpus(slot: int, max_parallel: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The GPUs of one of several runs in parallel; all of them where there are too few."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    share = len(gpus) // max_parallel
    if max_parallel == 1 or share == 0:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * share : (slot + 1) * share])}


def failure_reason(printed: str, code: int) -> str:
    """The line of what a run printed that says why it failed."""
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1][:MAX_QUOTED]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (lines[-1] if lines else f"exit code {code}")[:MAX_QUOTED]


def tokens_done(
    runs: Sequence[PlannedRun], results: Mapping[Path, RunResult], running: Iterable[RunProcess]
) -> tuple[int, str]:
    """Tokens of all runs that have ended or are running, and the progress bar's text."""
    tokens = sum(run.config.token_budget for run in runs if run.directory in results)
    parts = []
    for run in (process.run for process in running):
        budget = run.config.token_budget
        done = min(last_record(run.directory / METRICS).get("tokens", 0), budget)
        tokens += done
        parts.append(f"{run.name} {done / budget:.0%}")
    return tokens, f"{len(results)}/{len(runs)} runs | {', '.join(parts)}"
