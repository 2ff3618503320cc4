"""How the runs of a folder are: what each has done, when it was last heard of, when it will end."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import METRICS, read_settings, read_summary, run_directories
from gns_pretrain.runs.history import STARTS, read_starts
from gns_pretrain.runs.lock import LOCK, SILENCE_SECONDS
from gns_pretrain.system.slurm import job_states
from gns_pretrain.tracking.console import duration, short_number
from gns_pretrain.tracking.jsonl import last_record

# Which run was submitted as which SLURM job: a line a run in `<logs>/submitted.jsonl`.

SUBMITTED = "submitted.jsonl"
LOOK_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Submission:
    """A run and its job."""

    run_directory: Path  # absolute
    job: str  # 12, or 12_3 in an array


def note_submissions(folder: Path, submissions: Sequence[Submission]) -> None:
    """Write down what was submitted."""
    if not submissions:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SUBMITTED).open("a") as file:
        for each in submissions:
            values = {"run_directory": str(each.run_directory), "job": each.job}
            file.write(json.dumps(values | {"time": time.time()}) + "\n")


def read_submissions(folder: Path) -> dict[Path, str]:
    """The last job of each run."""
    path = folder / SUBMITTED
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines]
    return {Path(each["run_directory"]): each["job"] for each in values}


def queued(folder: Path, states: Mapping[str, str] | None) -> dict[Path, str]:
    """Of these the ones that wait or run, by SLURM's states.

    Raises:
        InputError: the states are not known, so that a run could be submitted twice.
    """
    if states is None:
        raise InputError(
            "squeue does not answer, so which runs are in the queue is not known and none was "
            "submitted; try again"
        )
    return {run: job for run, job in read_submissions(folder).items() if job in states}


def wait_until_ended(jobs: Sequence[str], *, say: Callable[[str], object]) -> None:
    """Return when none of the jobs waits or runs any more; while SLURM is silent, wait on."""
    silent = False
    while (states := job_states()) is None or any(job in states for job in jobs):
        if states is None and not silent:
            say("squeue does not answer; waiting until it does")
        silent = states is None
        time.sleep(LOOK_EVERY_SECONDS)


SUBMISSIONS = ("logs", "slurm")  # the launcher's folder, beside the runs
WAITING = ("PENDING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED")


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Args:
        name: its folder's.
        state: pending, running, finished, failed (or killed), preempted (saved, to go on), or
            unknown (of a job about which SLURM does not answer).
        step: optimizer steps done.
        tokens: consumed, of `token_budget`.
        loss: of the last recorded step, nats per token.
        batch_size: sequences.
        tokens_per_second: of the last recorded step.
        heartbeat: Unix time at which it last wrote or showed that it is alive.
        end: estimated Unix time of its end, at the last step's speed; None unless it is running.
        job: SLURM's id, if it has one.
        error: why it failed.
    """

    name: str
    state: str
    step: int = 0
    tokens: int = 0
    token_budget: int | None = None
    loss: float | None = None
    batch_size: int | None = None
    tokens_per_second: float | None = None
    heartbeat: float | None = None
    end: float | None = None
    job: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Traces:
    """What a run's folder shows of its starts."""

    finished: bool
    alive: bool  # somebody holds the folder, or has shown a sign of life a moment ago
    outcome: str | None  # of the last start; None where it has not ended in good order
    error: str
    heartbeat: float | None
    job: str | None
    started: bool


def statuses(
    path: Path, queue: Mapping[str, str] | None, *, now: float | None = None
) -> list[RunStatus]:
    """The status of every run in a folder, by name, also of those that wait for their first start.

    Args:
        path: a run's folder, or one that holds some.
        queue: state of each of the user's SLURM jobs, by id; None if SLURM does not answer.
        now: Unix time; by default the clock's.

    Raises:
        InputError: there is no such folder, or a file in it is damaged.
    """
    now = time.time() if now is None else now
    submitted = read_submissions(path.joinpath(*SUBMISSIONS))
    found = {folder.resolve(): folder for folder in run_directories(path)}
    waiting = [
        RunStatus(run.name, state_before_first_start(job, queue), job=job)
        for run, job in submitted.items()
        if run not in found and (queue is None or job in queue)
    ]
    known = [status_of(folder, queue, submitted.get(run), now=now) for run, folder in found.items()]
    return sorted([*known, *waiting], key=lambda status: status.name)


def state_before_first_start(job: str, queue: Mapping[str, str] | None) -> str:
    """The state of a run that was submitted and has no folder yet."""
    if queue is None:
        return "unknown"
    return "pending" if queue[job] in WAITING else "running"


def status_of(
    folder: Path, queue: Mapping[str, str] | None, submitted_as: str | None, *, now: float
) -> RunStatus:
    """The status of one run that has a folder."""
    traces = look_at(folder, now=now)
    known = queue or {}
    job = traces.job if traces.job in known else submitted_as or traces.job
    state = state_of(traces, known.get(job or ""))
    if queue is None and job is not None and not (traces.finished or traces.alive):
        state = "unknown"
    last = last_record(folder / METRICS, kind="train")
    budget = read_settings(folder).get("token_budget")
    speed = last.get("tokens_per_second")
    end = None
    if state == "running" and budget and speed:
        end = now + max(budget - last["tokens"], 0) / speed
    return RunStatus(
        name=folder.name,
        state=state,
        step=last.get("step", 0),
        tokens=last.get("tokens", 0),
        token_budget=budget,
        loss=last.get("loss"),
        batch_size=last.get("batch_size"),
        tokens_per_second=speed,
        heartbeat=traces.heartbeat,
        end=end,
        job=job,
        error=traces.error if state == "failed" else "",
    )


def state_of(traces: Traces, job_state: str | None) -> str:
    """A run's state from its traces and its job's state in SLURM's queue (None: not in it)."""
    if traces.finished:
        return "finished"
    if traces.alive:
        return "running"
    if job_state in WAITING:
        return "preempted" if traces.outcome == "stopped" else "pending"
    if job_state is not None:
        return "running"
    if traces.outcome == "stopped":
        return "preempted"
    return "failed" if traces.started else "pending"


def look_at(folder: Path, *, now: float) -> Traces:
    """Read what a run's starts have left."""
    events = read_starts(folder)
    starts = [event for event in events if event["event"] == "start"]
    last: dict[str, Any] = events[-1] if events else {}
    lock = folder / LOCK
    holder = lock.read_text().strip() if lock.exists() else ""
    files = [folder / name for name in (METRICS, STARTS)] + ([lock] if holder else [])
    beats = [path.stat().st_mtime for path in files if path.exists()]
    slurm = (starts[-1].get("slurm") or {}) if starts else {}
    return Traces(
        finished=read_summary(folder).get("state") == "finished",
        alive=bool(holder) and now - lock.stat().st_mtime < SILENCE_SECONDS,
        outcome=last.get("outcome"),
        error=last.get("error", "") or ("killed" if last.get("event") == "start" else ""),
        heartbeat=max(beats, default=None),
        job=slurm.get("job"),
        started=bool(starts) or (folder / METRICS).exists(),
    )


def status_view(runs: list[RunStatus], *, now: float | None = None) -> Group:
    """The runs for a terminal: a table, and a line for each that has failed."""
    now = time.time() if now is None else now
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    table = Table(title=title or "no runs", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for column in ("step", "tokens", "loss", "batch", "tok/s", "heartbeat", "end"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(run.name, run.state, *cells(run, now))
    lines = [f"{run.name}: {run.error}" for run in runs if run.error]
    if "unknown" in counts:
        lines.append("unknown: squeue does not answer; look again")
    return Group(table, *(Text(line) for line in lines))


def cells(run: RunStatus, now: float) -> list[str]:
    """A run's numbers as text; empty where there is none."""
    share = f" ({run.tokens / run.token_budget:.0%})" if run.token_budget else ""
    return [
        f"{run.step:,}" if run.step else "",
        f"{short_number(run.tokens)}{share}" if run.tokens else "",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.batch_size is None else f"{run.batch_size:,}",
        "" if run.tokens_per_second is None else short_number(run.tokens_per_second),
        "" if run.heartbeat is None else f"{duration(max(now - run.heartbeat, 0))} ago",
        "" if run.end is None else f"{datetime.fromtimestamp(run.end):%a %d %b %H:%M}",
    ]


def as_dicts(runs: list[RunStatus]) -> list[dict[str, Any]]:
    """The runs for a program; times are Unix times."""
    return [asdict(run) for run in runs]
