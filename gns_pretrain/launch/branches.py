"""Branches of a run: it goes on from its checkpoints at other batch sizes, over a window of tokens.

They measure the critical batch (arXiv:2505.23971, Section 3; `results/critical_batch.py` reads
them). A branch is a run of its own, with the source's settings save these:

    init.from, init.what     a checkpoint of the source, everything of it
    batch_size               constant, k times the source's there
    optimizer's rates        the source's there (peak x schedule x its batch's factor) x k^p
    schedule                 constant, so that all of a window is trained at one rate
    token_budget             the checkpoint's tokens and the window
    noise_scale              nothing is measured
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gns_pretrain.batch_size.policies import LR_EXPONENTS
from gns_pretrain.errors import InputError, counted
from gns_pretrain.fields import Settings, at_least, one_of, path_name
from gns_pretrain.runs.branches import MIN_STEPS, TABLE, step_of_window
from gns_pretrain.runs.directory import CHECKPOINTS, METRICS, read_settings
from gns_pretrain.runs.identity import EXECUTION, flatten
from gns_pretrain.system.files import read_json
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint_reader import checkpoint_folders
from gns_pretrain.training.checkpoint_writer import TRAIN_STATE
from gns_pretrain.training.schedule import Schedule, ScheduleSettings, steps_in_budget

EVALUATIONS = 8  # in a window
RATES = ("optimizer.lr", "optimizer.adamw.lr")  # peaks, as far as an optimizer has them
# Of the source's settings, what a branch sets itself or does not take over.
OWN = (
    *("run_name", "table", "cell", "init", "batch_size", "micro_batch_size", "noise_scale"),
    *("schedule", "token_budget", "evaluation.every_tokens", *RATES),
)


@dataclass
class BranchSettings(Settings):
    """Which branches a sweep trains; see conf/hydra/sweeper/branches.yaml."""

    section: ClassVar[str] = "hydra.sweeper"

    source: Annotated[str | None, path_name()] = None
    steps: list[int] | None = None
    factors: Annotated[list[float] | tuple[float, ...], at_least(0.01)] = (0.5, 1, 2, 4, 8, 16)
    lr_scaling: Annotated[list[str] | tuple[str, ...], one_of(*LR_EXPONENTS)] = ("sqrt",)
    window_tokens: Annotated[int | None, at_least(1, "token")] = None


@dataclass(frozen=True)
class Point:
    """Where a branch leaves its source."""

    checkpoint: Path
    step: int
    tokens: int
    batch_size: int  # of the source there, sequences
    lr_factor: float  # on the source's peak rates: its schedule, and its batch's multiplier


def branches(settings: BranchSettings) -> list[list[str]]:
    """Return the overrides of each branch, as typed after `gns-pretrain train`.

    Raises:
        InputError: there is no such run or checkpoint, or a factor makes no whole batch.
    """
    if settings.source is None:
        raise InputError(
            "hydra.sweeper.source has no value; name the run to branch from, as in: "
            "hydra.sweeper.source=outputs/NAME"
        )
    source = Path(settings.source).resolve()
    nested = read_settings(source)
    if not nested:
        raise InputError(f"hydra.sweeper.source={settings.source} is not a run directory; name one")
    known = flatten(nested)
    points = [point_of(folder, nested) for folder in chosen(source, settings.steps)]
    length = known["data.sequence_length"]
    largest = max(points, key=lambda point: point.batch_size).batch_size * max(settings.factors)
    # A multiple of the largest step, so that all branches of a point see the same tokens.
    step_tokens = math.ceil(largest * length)
    window = settings.window_tokens or max(known["token_budget"] // 10, MIN_STEPS * step_tokens)
    window = math.ceil(window / step_tokens) * step_tokens
    records = read_records(source / METRICS)
    found = []
    for point in points:
        for factor in settings.factors:
            if factor == 1 and step_of_window(records, point.tokens, window):
                continue  # the source itself has trained it
            # The rate of the source's own batch is the same whatever the scaling.
            for scaling in settings.lr_scaling if factor != 1 else settings.lr_scaling[:1]:
                own = of_branch(point, factor, scaling, known, window, source.name)
                found.append([*kept(nested), *own])
    return found


def chosen(source: Path, steps: Sequence[int] | None) -> list[Path]:
    """The checkpoints to branch from, in order; all where no steps are named."""
    found = {int(f.name.removeprefix("step_")): f for f in checkpoint_folders(source / CHECKPOINTS)}
    if not found:
        raise InputError(
            f"hydra.sweeper.source={source} has no checkpoint; train it with "
            "checkpoint.every_steps and checkpoint.keep so that some stay"
        )
    missing = [step for step in steps or () if step not in found]
    if missing:
        raise InputError(
            f"hydra.sweeper.steps={list(steps or ())}: {source / CHECKPOINTS} has no checkpoint of "
            f"step {missing[0]}; it has {', '.join(map(str, sorted(found)))} "
            "(checkpoint.keep says how many stay)"
        )
    return [found[step] for step in sorted(steps or found)]


def point_of(checkpoint: Path, settings: dict[str, Any]) -> Point:
    """Where the source stood at a checkpoint, and at which share of its peak rates."""
    state = read_json(checkpoint / TRAIN_STATE, hint="branch from another checkpoint")
    known = {f.name for f in fields(ScheduleSettings)}
    initial = settings["batch_size"]["initial"]
    schedule = Schedule(
        ScheduleSettings(**{k: v for k, v in settings["schedule"].items() if k in known}),
        initial_batch_size=initial,
        total_steps=steps_in_budget(
            settings["token_budget"],
            batch_size=initial,
            sequence_length=settings["data"]["sequence_length"],
        ),
    )
    lr_factor = schedule.factor(state["samples"]) * state["lr_multiplier"]
    if lr_factor <= 0.0:
        raise InputError(
            f"{checkpoint} is where its run's learning rate has come to zero; branch from an "
            "earlier one, as in hydra.sweeper.steps=[...]"
        )
    return Point(checkpoint, state["step"], state["tokens"], state["batch_size"], lr_factor)


def kept(settings: dict[str, Any]) -> list[str]:
    """The source's settings that its branches share, as overrides."""
    words = [f"optimizer={settings['optimizer']['name']}"]
    for section, value in settings.items():
        for name, each in leaves(section, value):
            shared = not _is_any_of(name, EXECUTION) or name.startswith(("data.", "model."))
            if shared and not _is_any_of(name, OWN) and name != "optimizer.name":
                words.append(f"{name}={typed(each)}")
    return words


def leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """Dotted names and values below a setting; a mapping that users fill is one value."""
    if not isinstance(value, dict) or name in ("optimizer.kwargs", "model.rope_scaling"):
        return [(name, value)]
    return [leaf for key, each in value.items() for leaf in leaves(f"{name}.{key}", each)]


def of_branch(
    point: Point, factor: float, scaling: str, known: dict[str, Any], window: int, source: str
) -> list[str]:
    """What a branch sets itself, as overrides."""
    batch_size = point.batch_size * factor
    if batch_size != int(batch_size) or batch_size < 1:
        raise InputError(
            f"hydra.sweeper.factors: {factor:g} times the batch of {point.checkpoint}, "
            f"{counted(point.batch_size, 'sequence')}, is no whole number of them; leave it out"
        )
    rates = {
        name: known[name] * point.lr_factor * factor ** LR_EXPONENTS[scaling]
        for name in RATES
        if name in known
    }
    return [
        f"run_name={source}-at{point.step}-batch{int(batch_size)}-{scaling}",
        f"table={TABLE}",
        f"cell={scaling}",
        f"init.from={typed(str(point.checkpoint))}",
        "init.what=all",
        "schedule=constant",
        "schedule.warmup_fraction=0",
        "noise_scale=none",
        "batch_size=constant",
        f"batch_size.initial={int(batch_size)}",
        f"micro_batch_size={math.gcd(int(batch_size), known['micro_batch_size'])}",
        f"token_budget={point.tokens + window}",
        f"evaluation.every_tokens={max(window // EVALUATIONS, 1)}",
        "checkpoint.keep=1",
        *(f"{name}={rate!r}" for name, rate in rates.items()),
    ]


def typed(value: Any) -> str:
    """A value in Hydra's grammar of overrides; JSON's is a part of it but for its texts."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def _is_any_of(name: str, settings: Sequence[str]) -> bool:
    return any(name == listed or name.startswith(listed + ".") for listed in settings)
