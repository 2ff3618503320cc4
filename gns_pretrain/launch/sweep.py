"""The runs of a sweep: which there are, which need no training, and the others as processes.

A run is known by its directory. Rerun, a sweep trains only what is not finished; a run whose
training equals that of a finished one under another name (Table 8 and Table 9 share cells) gets a
copy of its record. A process is the command that a user would type, so one that dies takes no other
with it. What it prints goes to `<output_directory>/logs/<run_name>.log`.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gns_pretrain.config.compose import as_yaml
from gns_pretrain.config.schema import RUN_NAME, Config
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.errors import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    InputError,
    OneLineError,
    TrainingError,
    counted,
)
from gns_pretrain.launch.upload import upload
from gns_pretrain.runs.directory import (
    CONFIG,
    METRICS,
    PROVENANCE,
    SUMMARY,
    is_finished,
    read_summary,
)
from gns_pretrain.runs.history import new_run_id
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    deciding_settings,
    differing_settings,
    identifying_settings,
    settings_of_run,
)
from gns_pretrain.runs.progress import share_done
from gns_pretrain.system.files import must_write, whole_folder
from gns_pretrain.system.processes import (
    StopRequest,
    python_command,
    python_environment,
    threads_per_process,
)
from gns_pretrain.system.terminal import Console
from gns_pretrain.tracking.jsonl import write_summary

MAX_WIDTH = 1000  # columns of a table that the terminal may wrap
SHOWN = 5  # names or problems, of all, in an error


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, checked."""

    overrides: tuple[str, ...]  # as on the command line of `gns-pretrain train`
    config: Config
    directory: Path
    fingerprint: str  # of the data
    search_path: tuple[str, ...] = ()  # what else of the sweep's command says where YAML files lie

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        return identifying_settings(asdict(self.config), self.fingerprint)


@dataclass(frozen=True)
class RunResult:
    """What a sweep did with a run.

    Its state is finished (now), skipped (it was), shared (it equals another one), failed, stopped
    or submitted (to SLURM).
    """

    name: str
    state: str
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)  # of a run that is finished


def plan_runs(
    job_overrides: Sequence[Sequence[str]],
    compose: Callable[[Sequence[str]], Config],
    check: Callable[[Config], tuple[Path, str]],
    *,
    search_path: tuple[str, ...] = (),
) -> list[PlannedRun]:
    """Check every run of a sweep.

    Args:
        job_overrides: of each run.
        compose: makes settings of overrides.
        check: validates settings; returns the run directory and the data's fingerprint.
        search_path: of the sweep's command, for each run's own command.

    Returns:
        One run for each list of overrides; equal ones give the same object.

    Raises:
        InputError: some run cannot be started, or two different ones would share a directory.
    """
    planned: dict[Path, PlannedRun] = {}
    problems: Counter[str] = Counter()
    runs = []
    for overrides in job_overrides:
        try:
            config = compose(overrides)
            run = PlannedRun(tuple(overrides), config, *check(config), search_path)
            runs.append(planned.setdefault(run.directory, run))
            refuse_collision(runs[-1], run)
        except InputError as error:
            problems[str(error)] += 1
    if problems:
        shown = [
            f"{problem} ({counted(count, 'run')})"
            for problem, count in list(problems.items())[:SHOWN]
        ]
        more = ["..."] if len(problems) > SHOWN else []
        raise InputError(
            f"{problems.total()} of the sweep's {len(job_overrides)} runs cannot be started, so "
            f"none was: {'; '.join(shown + more)}"
        )
    return runs


def refuse_collision(known: PlannedRun, run: PlannedRun) -> None:
    """Refuse two runs that share a directory and differ in anything: only one would be trained."""
    differing = differing_settings(known.settings, run.settings)
    if not differing:
        return
    hint = "start each by a command of its own, with a run_name of its own"
    for name in differing:
        values = f"{known.settings.get(name)}{run.settings.get(name)}"
        if name != FINGERPRINT and re.fullmatch(RUN_NAME, f"run{values}"):
            hint = f"let run_name hold it, as in: 'run_name={known.name}-${{{name}}}'"
            break
    raise InputError(
        f"run_name={known.name} is the name of two runs that differ in {', '.join(differing)}; "
        f"{hint}"
    )


def stand_ins(runs: Sequence[PlannedRun]) -> list[str]:
    """A line for each data set that is not there and in whose place runs take another."""
    data = [run.config.data for run in runs]
    missing = [each for each in data if isinstance(each, ImageDataSettings) and each.is_missing]
    return sorted({each.found for each in missing})


def skip_or_reuse(run: PlannedRun, *, log: Callable[[str], None]) -> RunResult | None:
    """The result of a run that needs no training: finished, or given an equal one's record."""
    if run.config.resume == "never":
        return None
    if is_finished(run.directory):
        return RunResult(run.name, "skipped", "it was finished", read_summary(run.directory))
    if not run.directory.exists() and (equal := find_equal_run(run)):
        return copy_record(run, equal, log=log)
    return None


def find_equal_run(run: PlannedRun) -> Path | None:
    """A finished run beside this one whose training is the same, under another name."""
    wanted = deciding_settings(run.settings, Purpose.RECORD)
    for path in sorted(run.directory.parent.glob(f"*/{SUMMARY}")):
        settings = settings_if_finished(path.parent)
        if settings and deciding_settings(settings, Purpose.RECORD) == wanted:
            return path.parent
    return None


@cache  # a finished run changes no more, and a sweep asks for it once a run
def settings_if_finished(directory: Path) -> dict[str, Any] | None:
    """The settings of a finished run; None for another folder, which may be anyone's."""
    try:
        settings = settings_of_run(directory)
    except InputError:
        return None
    return settings if is_finished(directory) and FINGERPRINT in settings else None


def copy_record(run: PlannedRun, equal: Path, *, log: Callable[[str], None]) -> RunResult | None:
    """Give a run, which has no directory yet, the record of a finished one; W&B gets it too.

    None where another command is faster and trains it.
    """
    try:
        with whole_folder(run.directory) as unfinished:
            for name in (METRICS, PROVENANCE):
                shutil.copy2(equal / name, unfinished / name)
            (unfinished / CONFIG).write_text(as_yaml(run.config))
            summary = read_summary(equal) | {"same_as": equal.name}
            write_summary(unfinished / SUMMARY, summary)
            new_run_id(unfinished)
    except OSError:
        if not is_finished(run.directory):
            return None  # training it says what is wrong
        why = "another command has given it the record of an equal run"
        return RunResult(run.name, "skipped", why, read_summary(run.directory))
    if run.config.metrics.wandb.enabled:
        try:
            upload(run.directory, log=log)
        except OneLineError as error:
            log(str(error))
    return RunResult(run.name, "shared", f"the same training as {equal.name}", summary)


_RESULTS: list[RunResult] = []  # of this command's sweep, for `failed_runs_raise`


@contextmanager
def failed_runs_raise() -> Iterator[None]:
    """Raise, at the end of a command, that runs of its sweep failed.

    Hydra's own sweeper raises the first failure. A search (Optuna) passes over them, and ends
    well, or with a ValueError where no run is left.

    Raises:
        TrainingError: names the runs.
    """
    _RESULTS.clear()
    try:
        yield
    except InputError:
        raise
    except (TrainingError, ValueError):
        if all(result.state != "failed" for result in _RESULTS):
            raise
    if failed := [result.name for result in _RESULTS if result.state == "failed"]:
        names = ", ".join(failed[:SHOWN]) + (", ..." if len(failed) > SHOWN else "")
        raise TrainingError(
            f"{len(failed)} of the sweep's {len(_RESULTS)} runs failed ({names}); the tables say "
            "why, and the same command resumes them"
        )


def report_results(results: Sequence[RunResult], console: Console) -> None:
    """Print a table of all runs and the reasons below it; hand them to `failed_runs_raise`."""
    _RESULTS.extend(results)
    table = Table(title=counted(len(results), "run"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("steps", "last batch", "lowest val. loss", "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        figures = ["", "", "", ""]
        if summary := result.summary:
            figures = [
                f"{summary['steps']:,}",
                f"{summary['batch_size']:,}",
                f"{summary['minimum_validation_loss']:.4f}",
                f"{summary['seconds']:.0f} s",
            ]
        table.add_row(result.name, result.state, *figures)
    Console(file=console.file, width=MAX_WIDTH).print(table)  # as wide as it needs
    for result in results:
        if result.why and result.state != "skipped":
            print_line(console, f"{result.name} {result.state}: {result.why}")


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True)


UPDATE_SECONDS = 0.25  # between updates of the progress bar, and looks at a request to stop
MAX_QUOTED = 300  # characters of the line that says why a run failed


class RunProcess:
    """A run's own command, started in a slot of `max_parallel`."""

    def __init__(self, run: PlannedRun, *, slot: int, max_parallel: int) -> None:
        self.run = run
        self.stop_sent = False
        self.log = run.directory.parent / "logs" / f"{run.name}.log"
        with must_write(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            file = self.log.open("ab")
        with file:
            self.log_start = file.tell()  # after what earlier attempts have printed
            self.process = subprocess.Popen(
                command(run, max_parallel=max_parallel),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=python_environment() | share_of_gpus(slot, max_parallel, os.environ),
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
        printed = printed_since(self.log, self.log_start)
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
        bar = progress.add_task("", total=len(runs))
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
                    done, description = runs_done(len(runs), len(results), running.values())
                    progress.update(bar, completed=done, description=description)
                if running:
                    time.sleep(UPDATE_SECONDS)
        finally:  # an error of the sweep itself leaves no run behind
            for process in running.values():
                process.stop()
            for process in running.values():
                process.process.wait()
    return [results[run.directory] for run in runs]


def command(run: PlannedRun, *, max_parallel: int) -> list[str]:
    """`gns-pretrain train ...` for one run; in parallel, each has its share of the cores."""
    words = ["train", *run.search_path, "hydra.mode=RUN", *run.overrides]
    if max_parallel > 1 and run.config.launch.threads is None:
        ranks = run.config.launch.nproc_per_node
        words.append(f"launch.threads={threads_per_process(max_parallel * ranks)}")
    return python_command("gns_pretrain", *words)


def share_of_gpus(slot: int, max_parallel: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The GPUs of one of several runs in parallel; all of them where there are too few."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    share = len(gpus) // max_parallel
    if max_parallel == 1 or share == 0:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * share : (slot + 1) * share])}


def printed_since(log: Path, start: int) -> str:
    """What a run has printed into its log since `start`; a line that says why if it is gone."""
    try:
        return log.read_bytes()[start:].decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"


def failure_reason(printed: str, code: int) -> str:
    """The line of what a run printed that says why it failed."""
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1][:MAX_QUOTED]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (lines[-1] if lines else f"exit code {code}")[:MAX_QUOTED]


def runs_done(total: int, ended: int, running: Iterable[RunProcess]) -> tuple[float, str]:
    """Runs that have ended and shares of those that are running, and the progress bar's text."""
    shares = {process.run.name: share_done(process.run.directory) for process in running}
    parts = [f"{name} {share:.0%}" for name, share in shares.items()]
    return ended + sum(shares.values()), f"{ended}/{total} runs | {', '.join(parts)}"
