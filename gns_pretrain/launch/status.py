"""The status of a folder's runs: progress, losses, and when each has ended or will end."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from gns_pretrain.errors import DamagedFileError
from gns_pretrain.runs.directory import (
    LOCK,
    METRICS,
    STARTS,
    read_summary,
    run_directories,
)
from gns_pretrain.runs.history import read_starts
from gns_pretrain.runs.lock import DEAD_AFTER_SECONDS, holder_in
from gns_pretrain.runs.progress import budget_of
from gns_pretrain.system.slurm import LOG_FOLDER, read_submitted
from gns_pretrain.tracking.console import duration, short_number
from gns_pretrain.tracking.jsonl import last_record
from gns_pretrain.tracking.unit import TOKENS, Unit, unit_of

WAITING = ("PENDING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED")


@dataclass(frozen=True)
class RunStatus:
    """One run; numbers are those of its last recorded step.

    Its state is pending, running, finished, failed (or killed), preempted (saved, to be resumed),
    damaged (a file of it cannot be read), or unknown (of a job about which SLURM does not answer).
    """

    name: str  # of its directory
    state: str
    step: int = 0  # optimizer steps done
    done: float | None = None  # share of its budget, where that is known
    unit: Unit = TOKENS  # of its speed
    loss: float | None = None  # of the step's batch, nats per token
    validation_loss: float | None = None  # the last, nats per token
    batch_size: int | None = None  # sequences
    speed: float | None = None  # of the unit, a second
    heartbeat: float | None = None  # Unix time of its last sign of life
    end: float | None = None  # estimated Unix time, at the last step's speed, if it is running
    ended: float | None = None  # Unix time, if it neither runs nor waits for its first start
    job: str | None = None  # SLURM's id
    error: str = ""  # why it failed, or what is damaged


def statuses(
    path: Path, queue: Mapping[str, str] | None, *, now: float | None = None
) -> list[RunStatus]:
    """The status of every run in a folder, by name, also of those that wait for their first start.

    Args:
        path: a run directory, or a folder of some.
        queue: state of each of the user's SLURM jobs, by id; None if SLURM does not answer.
        now: Unix time; by default the clock's.

    Raises:
        InputError: there is no such folder.
    """
    now = time.time() if now is None else now
    jobs = read_submitted(path.joinpath(*LOG_FOLDER))
    runs = {directory.resolve(): directory for directory in run_directories(path)}
    for run, job in jobs.items():
        if queue is None or job in queue:
            runs.setdefault(run, run)  # one that has not started has no directory yet
    found = []
    for run, directory in runs.items():
        try:
            found.append(run_status(directory, queue, jobs.get(run), now=now))
        except DamagedFileError as error:
            found.append(RunStatus(directory.name, "damaged", error=str(error)))
    return sorted(found, key=lambda run: run.name)


def run_status(
    directory: Path, queue: Mapping[str, str] | None, submitted_as: str | None, *, now: float
) -> RunStatus:
    """The status of a run, whose directory may not exist yet; DamagedFileError if it is damaged."""
    events = read_starts(directory)
    starts = [event for event in events if event["event"] == "start"]
    ending: dict[str, Any] = events[-1] if events else {}
    lock = directory / LOCK
    held = bool(holder_in(lock))
    alive = held and now - lock.stat().st_mtime < DEAD_AFTER_SECONDS
    signs_of_life = [directory / METRICS, directory / STARTS, *([lock] if held else [])]

    job = ((starts[-1].get("slurm") or {}) if starts else {}).get("job")
    if job not in (queue or {}):
        job = submitted_as or job
    job_state = (queue or {}).get(job or "")
    if read_summary(directory).get("state") == "finished":
        state = "finished"
    elif alive:
        state = "running"
    elif queue is None and job is not None:
        state = "unknown"
    elif job_state is not None and job_state not in WAITING:
        state = "running"
    elif ending.get("outcome") == "stopped":
        state = "preempted"
    elif job_state is not None or not (starts or (directory / METRICS).exists()):
        state = "pending"
    else:
        state = "failed"
    error = ending.get("error") or ("killed" if ending.get("event") == "start" else "")

    last = last_record(directory / METRICS, kind="train")
    unit, budget = unit_of(last), budget_of(directory)
    speed = last.get(unit.speed)
    heartbeat = max((p.stat().st_mtime for p in signs_of_life if p.exists()), default=None)
    end = ended = None
    if state == "running" and budget and speed:
        end = now + max(budget - last.get(unit.name, 0), 0) / speed
    elif state in ("finished", "failed", "preempted"):
        ended = ending.get("time") if ending.get("event") == "end" else None
        ended = ended or heartbeat
    return RunStatus(
        name=directory.name,
        state=state,
        step=last.get("step", 0),
        done=last.get(unit.name, 0) / budget if budget else None,
        unit=unit,
        loss=last.get("loss"),
        validation_loss=last_record(directory / METRICS, kind="validation").get("loss"),
        batch_size=last.get("batch_size"),
        speed=speed,
        heartbeat=heartbeat,
        end=end,
        ended=ended,
        job=job,
        error=error if state == "failed" else "",
    )


def status_view(runs: list[RunStatus], *, now: float | None = None) -> Group:
    """The runs for a terminal: a table, and a line for each that has failed."""
    now = time.time() if now is None else now
    counts = Counter(run.state for run in runs)
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    table = Table(title=title or "no runs", title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    speed = " ".join(dict.fromkeys(run.unit.short for run in runs)) or TOKENS.short
    for column in ("step", "done", "loss", "val.", "batch", speed, "end"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.name,
            run.state,
            f"{run.step:,}" if run.step else "",
            "" if run.done is None else f"{run.done:.0%}",
            "" if run.loss is None else f"{run.loss:.3f}",
            "" if run.validation_loss is None else f"{run.validation_loss:.4f}",
            "" if run.batch_size is None else f"{run.batch_size:,}",
            "" if run.speed is None else short_number(run.speed),
            "" if (end := run.end or run.ended) is None else when(end, now),
        )
    lines = [f"{run.name}: {run.error}" for run in runs if run.error]
    if "unknown" in counts:
        lines.append("unknown: squeue does not answer; look again")
    return Group(table, *lines)


def when(moment: float, now: float) -> str:
    """A Unix time as it is read: `in 5 min 10 s` if it is to come, else 17:30 or 26 Nov 17:30."""
    if moment > now:
        return f"in {duration(moment - now)}"
    then, today = datetime.fromtimestamp(moment), datetime.fromtimestamp(now).date()
    return f"{then:%H:%M}" if then.date() == today else f"{then:%d %b %H:%M}"
