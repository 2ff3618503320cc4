"""A run in W&B after the fact: its record through the view that a run has while training."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.runs.directory import (
    CONFIG,
    METRICS,
    is_finished,
    read_settings,
    read_summary,
)
from gns_pretrain.runs.history import new_run_id, read_provenance, read_starts
from gns_pretrain.runs.lock import locked
from gns_pretrain.system.files import parse
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.tracking.settings import WandbSettings
from gns_pretrain.tracking.views import MayFail
from gns_pretrain.tracking.wandb import WandbView, about

WAIT_SECONDS = 600.0  # for all records of a long run


def upload(
    directory: Path, *, log: Callable[[str], None], changed: Mapping[str, Any] | None = None
) -> int:
    """Show a run in W&B under its id, group, tags and settings; a second time adds what is missing.

    Args:
        directory: of a run that is not training now.
        log: prints a line: how to upload an offline run.
        changed: what is not to be as its `metrics.wandb` says.

    Returns:
        The number of records.

    Raises:
        InputError: there is nothing to upload, or the run is training.
        TrainingError: W&B could not take it.
    """
    # A finished run changes no more, and the process that has trained it may hold the lock still.
    with nullcontext() if is_finished(directory) else locked(directory):
        records = read_records(directory / METRICS)
        if not records:
            raise InputError(f"{directory} has no record to upload; train the run first")
        config = read_settings(directory)
        own = (config.get("metrics") or {}).get("wandb") or {}
        settings = parse(WandbSettings, own, source=directory / CONFIG, hint="restore the file")
        summary = read_summary(directory)
        starts = [event for event in read_starts(directory) if event["event"] == "start"]
        facts = about(
            num_ranks=starts[-1].get("ranks") if starts else None,
            parameters=summary.get("parameters"),
        )
        open_view = partial(
            WandbView,
            directory,
            dataclasses.replace(settings, **changed or {}),
            config=config | facts,
            run_id=read_provenance(directory).get("run_id") or new_run_id(directory),
            log=log,
            records=records,
            replaces=True,
        )
        view = MayFail("W&B", open_view, lambda line: None, wait_seconds=WAIT_SECONDS)
        if summary:
            view.finish(summary)
        view.close()
    if view.failure:
        raise TrainingError(f"{directory} is not uploaded ({view.failure})")
    return len(records)
