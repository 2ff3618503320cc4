"""The runs of a sweep: which there are, which need no training, and their results.

A run is known by its directory. Started again, a sweep trains only what is not finished; a run
whose training equals that of a finished one under another name (Table 8 and Table 9 share cells)
gets a copy of its record.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gns_pretrain.config.compose import as_yaml
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.build import shown_as
from gns_pretrain.runs.directory import (
    CONFIG,
    METRICS,
    PROVENANCE,
    SUMMARY,
    is_finished,
    read_summary,
)
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    Purpose,
    deciding_settings,
    differing_settings,
    identifying_settings,
    settings_of_run,
)
from gns_pretrain.runs.provenance import new_run_id
from gns_pretrain.tracking.jsonl import read_records, write_summary
from gns_pretrain.tracking.views import MayFail
from gns_pretrain.tracking.wandb import WandbView

MAX_WIDTH = 1000  # columns of a table that the terminal may wrap
SHOWN = 5  # names or problems, of all, in an error


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, checked."""

    overrides: tuple[str, ...]  # as on the command line of train.py
    config: Config
    directory: Path
    fingerprint: str  # of the data

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
) -> list[PlannedRun]:
    """Check every run of a sweep.

    Args:
        job_overrides: of each run.
        compose: makes settings of overrides.
        check: validates settings; returns the run directory and the data's fingerprint.

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
            run = PlannedRun(tuple(overrides), config, *check(config))
            runs.append(planned.setdefault(run.directory, run))
            refuse_collision(runs[-1], run)
        except InputError as error:
            problems[str(error)] += 1
    if problems:
        shown = [
            f"{problem} ({count} run{'s' if count > 1 else ''})"
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
    name, value = differing[0], run.settings.get(differing[0])
    hint = f"let run_name hold it, as in: 'run_name={known.name}-${{{name}}}'"
    if name == FINGERPRINT or "/" in str(value):
        hint = "start each by a command of its own, with a run_name of its own"
    raise InputError(
        f"run_name={known.name} is the name of two runs that differ in {', '.join(differing)}; "
        f"{hint}"
    )


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


def copy_record(run: PlannedRun, equal: Path, *, log: Callable[[str], None]) -> RunResult:
    """Give a run, which has no directory yet, the record of a finished one; W&B gets it too."""
    unfinished = run.directory.with_name(f".{run.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in (METRICS, PROVENANCE):
        shutil.copy2(equal / name, unfinished / name)
    (unfinished / CONFIG).write_text(as_yaml(run.config))
    summary = read_summary(equal) | {"same_as": equal.name}
    write_summary(unfinished / SUMMARY, summary)
    run_id = new_run_id(unfinished)
    unfinished.rename(run.directory)
    wandb = shown_as(run.config).wandb
    if wandb.enabled:
        config = asdict(run.config)
        make_view = partial(WandbView, run.directory, wandb, config=config, run_id=run_id)
        view = MayFail("W&B", make_view, log)
        for record in read_records(run.directory / METRICS):
            view.write(record)
        view.finish(summary)
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
    table = Table(title=f"{len(results)} runs", title_justify="left", box=box.SIMPLE_HEAD)
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
    console.print(line, soft_wrap=True, markup=False, highlight=False)
