"""The runs of a sweep: which there are, and which need no training.

A run is known by its folder. Started again, a sweep trains only what is not finished; a run whose
training equals that of a finished one under another name (Table 8 and Table 9 share cells) takes
over its record.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gns_pretrain.config.compose import as_dict, as_yaml
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.build import shown_as
from gns_pretrain.runs.directory import (
    CONFIG,
    PROVENANCE,
    SUMMARY,
    draw_run_id,
    is_finished,
    read_summary,
)
from gns_pretrain.runs.identity import (
    FINGERPRINT,
    differing_settings,
    flatten,
    same_training,
    settings_of_run,
)
from gns_pretrain.tracking.jsonl import read_records, write_summary
from gns_pretrain.tracking.views import MayFail
from gns_pretrain.tracking.wandb import WandbView

# What became of the runs of a sweep.

# Names of this command's runs that failed: a search passes over them and ends well without.
FAILED: list[str] = []
MAX_WIDTH = 1000  # columns of a table that the terminal may wrap
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        name: of the run.
        state: finished (now), skipped (it was), shared (it equals another one), failed or stopped.
        why: of a run that is not there, or whose record is another's.
        summary: of the finished run.
    """

    name: str
    state: str
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        """Whether the run's record is whole."""
        return self.state in ("finished", "skipped", "shared")


def note_failures(outcomes: Sequence[Outcome]) -> None:
    """Remember for the end of the command which of its runs failed."""
    FAILED.extend(outcome.name for outcome in outcomes if outcome.state == "failed")


def failure_of_sweep() -> TrainingError | None:
    """What to say at the end of a sweep some of whose runs failed."""
    if not FAILED:
        return None
    names = ", ".join(FAILED[:SHOWN_NAMES]) + (", ..." if len(FAILED) > SHOWN_NAMES else "")
    return TrainingError(
        f"{len(FAILED)} of the sweep's runs failed ({names}); the tables say why, and the same "
        "command goes on with them"
    )


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table of what ran, what was skipped and what failed, and why; as wide as it needs."""
    table = Table(title=f"{len(outcomes)} runs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("steps", "last batch", "lowest val. loss", "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        summary = outcome.summary
        figures = ["", "", "", ""]
        if summary:
            figures = [
                f"{summary['steps']:,}",
                f"{summary['batch_size']:,}",
                f"{summary['minimum_validation_loss']:.4f}",
                f"{summary['seconds']:.0f} s",
            ]
        table.add_row(outcome.name, outcome.state, *figures)
    Console(file=console.file, width=MAX_WIDTH).print(table)
    for outcome in outcomes:
        if outcome.why and outcome.state != "skipped":
            line = f"{outcome.name} {outcome.state}: {outcome.why}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)


SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Job:
    """One run of a sweep, checked.

    Args:
        overrides: the settings that make it, as for train.py.
        config: all its settings.
        directory: its folder.
        fingerprint: of its data; empty where the data was not looked at.
    """

    overrides: tuple[str, ...]
    config: Config
    directory: Path
    fingerprint: str = ""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted names, and the data's fingerprint."""
        return flatten(as_dict(self.config)) | {FINGERPRINT: self.fingerprint}


def plan_jobs(
    runs: Sequence[tuple[Sequence[str], Callable[[], Config]]],
    *,
    inspect: Callable[[Config], tuple[Path, str]],
) -> list[Job]:
    """Check every run of a sweep; runs that are the same come once.

    Args:
        runs: each run's overrides, and what makes its settings of them.
        inspect: checks settings against this machine; gives the run's folder and the data's
            fingerprint.

    Raises:
        InputError: some run cannot be started, or two different ones would share a folder; nothing
            has been started.
    """
    jobs: dict[Path, Job] = {}
    problems: dict[str, int] = {}
    for overrides, make_config in runs:
        try:
            config = make_config()
            job = Job(tuple(overrides), config, *inspect(config))
            known = jobs.setdefault(job.directory, job)
            refuse_collision(known, job)
        except InputError as error:
            problems[str(error)] = problems.get(str(error), 0) + 1
    if problems:
        shown = [
            f"{problem} ({count} run{'s' * (count > 1)})"
            for problem, count in list(problems.items())[:SHOWN_PROBLEMS]
        ]
        raise InputError(
            f"{sum(problems.values())} of the sweep's {len(runs)} runs cannot be started, so none "
            f"was: {'; '.join(shown)}{'; ...' * (len(problems) > SHOWN_PROBLEMS)}"
        )
    return list(jobs.values())


def refuse_collision(known: Job, job: Job) -> None:
    """Refuse two runs that differ in anything and share a folder: only one of them would run."""
    differing = differing_settings(known.settings, job.settings)
    if not differing:
        return
    name, value = differing[0], job.settings.get(differing[0])
    hint = f"let run_name hold it, as in: 'run_name={known.name}-${{{name}}}'"
    if name == FINGERPRINT or "/" in str(value):
        hint = "start each by a command of its own, with a run_name of its own"
    raise InputError(
        f"run_name={known.name} is the name of two runs that differ in {', '.join(differing)}; "
        f"{hint}"
    )


def finished_twin(job: Job, folders: Iterable[Path]) -> Path | None:
    """A finished run whose training is this one's under another name, on the same data."""
    others = (folder for folder in folders if folder != job.directory)
    wanted = job.settings
    return next(
        (
            folder
            for folder in others
            if (found := finished_run(folder)) and same_training(found, wanted)
        ),
        None,
    )


@cache  # a finished run changes no more, and a sweep asks for it once a job
def finished_run(folder: Path) -> dict[str, Any] | None:
    """The settings of a finished run; None for a folder that is not one of this program's."""
    try:
        settings = settings_of_run(folder)
    except InputError:
        return None
    return settings if is_finished(folder) and FINGERPRINT in settings else None


def share_record(job: Job, twin: Path, *, say: Callable[[str], None]) -> Outcome:
    """Give a run the record of a finished one with the same training; views are told it too.

    Args:
        job: a run whose folder is not there yet.
        twin: the finished run's folder.
        say: prints a line.
    """
    unfinished = job.directory.with_name(f".{job.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in ("metrics.jsonl", PROVENANCE):
        shutil.copy2(twin / name, unfinished / name)
    (unfinished / CONFIG).write_text(as_yaml(job.config))
    summary = read_summary(twin) | {"same_as": twin.name}
    write_summary(unfinished / SUMMARY, summary)
    run_id = draw_run_id(unfinished)
    unfinished.rename(job.directory)
    settings = shown_as(job.config).wandb
    if settings.enabled:
        values = as_dict(job.config)
        view = MayFail(
            "W&B",
            partial(WandbView, job.directory, settings, config=values, run_id=run_id),
            say,
        )
        for record in read_records(job.directory / "metrics.jsonl"):
            view.write(record)
        view.finish(summary)
    return Outcome(job.name, "shared", f"the same training as {twin.name}", summary)


def settle(job: Job, *, say: Callable[[str], None]) -> Outcome | None:
    """The outcome of a run that needs no training; None for one that does."""
    if job.config.resume == "never":
        return None
    if is_finished(job.directory):
        return Outcome(job.name, "skipped", "it was finished", read_summary(job.directory))
    if job.fingerprint and not job.directory.exists():
        folders = sorted(path.parent for path in job.directory.parent.glob(f"*/{SUMMARY}"))
        if twin := finished_twin(job, folders):
            return share_record(job, twin, say=say)
    return None
