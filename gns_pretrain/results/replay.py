"""What a batch-size policy chooses on a recorded run's noise scale, beside what the run did.

python -m gns_pretrain.results.replay FILE [--theta 0.6] ...

FILE is a published curve, a W&B export or a run's metrics.jsonl (`reading.py`). The settings are
those of the published signSGD runs (arXiv:2602.03001, Figure 3), or of the config.yaml beside a
metrics.jsonl, unless an option says otherwise. The replay counts its own sequences, step by step,
from nothing but the noise scale. Exit code: 0 the same path, 1 another one, 2 bad input.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gns_pretrain.batch_size.controller import BatchSizer, Controller
from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policies import (
    LR_SCALINGS,
    POLICIES,
    ROUNDINGS,
    TARGETS,
    Policy,
    Position,
)
from gns_pretrain.batch_size.settings import BatchSizeSettings
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.smoothing import SmoothingSettings
from gns_pretrain.results.reading import History, Row, read_history
from gns_pretrain.training.schedule import Schedule, ScheduleSettings, steps_in_budget

# A replayed path beside the recorded one: the table, the verdict, JSON.

LEARNING_RATE_TOLERANCE = 1e-9  # relative


@dataclass(frozen=True)
class Replayed:
    """One recorded step and its replay.

    Args:
        row: the record's.
        batch_size: sequences of the step; None once the replay has reached the budget.
        tokens: consumed when it was done; likewise.
        lr: learning rate; None also where the peak is not known.
        target: of the last decision that was taken, sequences; None before the first.
    """

    row: Row
    batch_size: int | None
    tokens: int | None
    lr: float | None
    target: float | None

    @property
    def difference(self) -> str | None:
        """What differs first, for people; None if all that the record says is the same."""
        row = self.row
        if self.batch_size is None or self.tokens is None:
            return "the replay has reached its token budget before it"
        for name, recorded, mine in (
            ("batch size", row.batch_size, self.batch_size),
            ("tokens", row.tokens, self.tokens),
        ):
            if recorded is not None and recorded != mine:
                return f"{name} {recorded:,} in the file, {mine:,} in the replay"
        if (error := self.lr_error) is not None and not error <= LEARNING_RATE_TOLERANCE:
            return f"lr {row.lr!r} in the file, {self.lr!r} in the replay"
        return None

    @property
    def lr_error(self) -> float | None:
        """Difference of the learning rates over the recorded one; None where one is missing."""
        if self.row.lr is None or self.lr is None:
            return None
        scale = abs(self.row.lr) or 1.0
        return abs(self.lr - self.row.lr) / scale


def first_difference(path: list[Replayed]) -> str | None:
    """The first row that differs, named; None if none does."""
    for step in path:
        if step.difference is not None:
            return (
                f"first difference at step {step.row.step:,} ({step.row.where}): {step.difference}"
            )
    return None


def side_by_side(path: list[Replayed], *, every_row: bool) -> list[str]:
    """A table of the two paths: first, last and differing rows, and those where a batch changes."""
    lines = [
        f"{'':>9} | {'in the file':^36} | {'replayed':^46}",
        f"{'step':>9} | {'batch':>6} {'tokens':>16} {'lr':>12} "
        f"| {'target':>9} {'batch':>6} {'tokens':>16} {'lr':>12}",
    ]
    differed = False
    for before, step, after in zip([None, *path], path, [*path[1:], None], strict=False):
        turns = (
            before is None
            or after is None
            or (before.batch_size, before.row.batch_size) != (step.batch_size, step.row.batch_size)
        )
        if every_row or turns or (step.difference and not differed):
            lines.append(path_line(step))
        differed = differed or step.difference is not None
    return lines


def path_line(step: Replayed) -> str:
    """One row of the table."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    row = step.row
    return (
        f"{row.step:>9,} | {text(row.batch_size, ','):>6} {text(row.tokens, ','):>16} "
        f"{text(row.lr, '.6e'):>12} | {text(step.target, ',.1f'):>9} "
        f"{text(step.batch_size, ','):>6} {text(step.tokens, ','):>16} {text(step.lr, '.6e'):>12}"
        f"{'   <- differs' if step.difference else ''}"
    )


def verdict(path: list[Replayed]) -> str:
    """One line on how the two paths compare."""
    difference = first_difference(path)
    if difference is not None:
        return difference
    errors = [step.lr_error for step in path if step.lr_error is not None]
    batches = sum(step.row.batch_size is not None for step in path)
    tokens = sum(step.row.tokens is not None for step in path)
    largest = f"; largest relative difference of lr {max(errors):.1e}" if errors else ""
    return (
        f"the same path in {len(path):,} rows: batch size in {batches:,}, tokens in {tokens:,}, "
        f"lr in {len(errors):,}{largest}"
    )


def as_json(path: list[Replayed]) -> dict[str, Any]:
    """The two paths for another program."""
    keys = ("batch_size", "tokens", "lr", "target")
    return {
        "rows": len(path),
        "first_difference": first_difference(path),
        "path": [
            {
                "step": step.row.step,
                "recorded": {key: value for key, value in asdict(step.row).items() if key in keys},
                "replayed": {key: getattr(step, key) for key in keys},
            }
            for step in path
        ],
    }


# Settings of a replay: the published runs', or a run's own, with the command's options on top.

ESTIMATE_NAMES = sorted({name for it in GEOMETRIES.values() for name in it.estimates})

# The published signSGD runs, as Figure 3's files show them.
PUBLISHED: dict[str, Any] = {
    "batch_size": {
        "policy": "adaptive",
        "initial": 64,
        "micro_batch_max": 16,
        "micro_batch_step": 4,
    },
    "micro_batch_size": 8,
    "num_ranks": 8,
    "token_budget": 3_200_000_000,
    "sequence_length": 2048,
    "peak_lr": 3e-3,
}

# Name, type, choices and meaning of each option that sets a field of the same name.
POLICY_OPTIONS: tuple[tuple[str, Any, tuple[str, ...] | None, str], ...] = (
    ("policy", str, tuple(POLICIES), "what chooses the batch size"),
    ("theta", float, None, "tolerated noise-to-signal ratio; eta of the norm test"),
    ("target", str, TARGETS, "how a noise scale becomes a batch size"),
    ("kappa", float, None, "share of the largest gain, for --target kappa"),
    ("geometry", str, tuple(GEOMETRIES), "whose noise scale"),
    ("estimate", str, tuple(ESTIMATE_NAMES), "which estimate of it"),
    ("noise_decay", float, None, "beta^N; averages the single measurements anew"),
    ("signal_decay", float, None, "beta^M; likewise"),
    ("rounding", str, ROUNDINGS, "to a feasible size"),
    ("cap", int, None, "sequences never exceeded"),
    ("lr_scaling", str, LR_SCALINGS, "of the learning rate with the batch"),
    ("decide_every_steps", int, None, "decision interval"),
    ("warmup_fraction", float, None, "of the sample budget, without a change"),
    ("initial", int, None, "first batch size, sequences"),
    ("micro_batch_max", int, None, "largest micro-batch, sequences"),
    ("micro_batch_step", int, None, "sequences by which it grows"),
    ("ramp_size", int, None, "sequences at the end of --policy linear_ramp"),
    ("ramp_tokens", int, None, "tokens that it takes"),
)
STAGE_OPTIONS = (
    ("stage_tokens", "tokens from which on each stage of --policy staged has its size"),
    ("stage_sizes", "sequences of each"),
)
RUN_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("num_ranks", int, "data-parallel ranks"),
    ("micro_batch_size", int, "smallest micro-batch, sequences"),
    ("min_samples", int, "micro-batches that a step has at least"),
    ("token_budget", int, "tokens of the run"),
    ("sequence_length", int, "tokens of a sequence"),
    ("peak_lr", float, "learning rate before schedule and multiplier"),
)


@dataclass(frozen=True)
class ReplaySettings:
    """What a replay must know of a run beside its noise scale."""

    batch_size: BatchSizeSettings
    sizes: FeasibleSizes
    smoothing: SmoothingSettings
    schedule: ScheduleSettings
    token_budget: int
    sequence_length: int
    peak_lr: float | None

    def __str__(self) -> str:
        policy = self.batch_size
        noise, decides = "", ""
        if policy.reads:
            by_theta = policy.policy == "norm_test" or policy.target == "theta"
            aim = f"theta {policy.theta:g}" if by_theta else policy.target
            noise = f" on {' '.join(policy.reads)}, {aim}"
            decides = f"; decides every {policy.decide_every_steps} steps"
        if policy.policy == "adaptive":
            decides += f" after {policy.warmup_fraction:.0%} of {self.token_budget:,} tokens"
        return (
            f"{policy.policy}{noise}, rounded {policy.rounding}, from {policy.initial} on "
            f"{self.sizes}{decides}"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options; what is not given comes from the run or the published runs."""
    parser.add_argument("file", type=Path, help="published CSV, W&B export or metrics.jsonl")
    for name, kind, choices, meaning in POLICY_OPTIONS:
        parser.add_argument(option(name), type=kind, choices=choices, help=meaning)
    for name, meaning in STAGE_OPTIONS:
        parser.add_argument(option(name), type=int, nargs="+", help=meaning)
    for name, kind, meaning in RUN_OPTIONS:
        parser.add_argument(option(name), type=kind, help=meaning)
    parser.add_argument("--run", help="of a panel's export that holds several runs")
    parser.add_argument("--every-row", action="store_true", help="print every row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def option(name: str) -> str:
    """`--micro-batch-size` of micro_batch_size."""
    return "--" + name.replace("_", "-")


def run_config(file: Path) -> dict[str, Any]:
    """The settings of the run that a metrics.jsonl belongs to; empty where there are none."""
    path = file.parent / "config.yaml"
    if file.suffix != ".jsonl" or not path.is_file():
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML that can be read; restore it") from error
    return values if isinstance(values, dict) else {}


def policy_settings(
    given: argparse.Namespace, config: dict[str, Any], *, initial: int | None
) -> BatchSizeSettings:
    """The policy to replay; a constant run has nothing to replay, and gets the adaptive one.

    Args:
        given: the command's options; None where one was not given.
        config: `run_config` of the file.
        initial: first batch size that the record tells, sequences; None where it tells none.
    """
    values = dict(config.get("batch_size", {}) or PUBLISHED["batch_size"]) | {"shadows": []}
    if values.get("policy", "constant") == "constant":
        values["policy"] = "adaptive"
    recorded = values["policy"]
    names = [row[0] for row in POLICY_OPTIONS] + [row[0] for row in STAGE_OPTIONS]
    options = {name: getattr(given, name) for name in names}
    values |= {"initial": initial} if initial is not None else {}
    if (recorded == "norm_test") != ((options["policy"] or recorded) == "norm_test"):
        values |= dict.fromkeys(Policy.own_values)  # the norm test has its own
    values |= {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(BatchSizeSettings)}
    return BatchSizeSettings(**{name: values[name] for name in values if name in known})


def settings_for(
    given: argparse.Namespace, config: dict[str, Any], history: History
) -> ReplaySettings:
    """Everything a replay needs.

    Args:
        given: the command's options; None where one was not given.
        config: `run_config` of the file.
        history: of the file; its first row tells what nobody else does.

    Raises:
        InputError: settings that cannot be, or that do not fit one another.
    """
    split = first_split(history)
    policy = policy_settings(given, config, initial=history.rows[0].batch_size)
    if policy.reads and not history.measurements:
        raise InputError(
            f"the file holds no measurement of geometry {policy.reads[0]}, estimate "
            f"{policy.reads[1]}; name one that was measured with --geometry and --estimate"
        )

    def chosen(name: str, *sources: Any) -> Any:
        values = (getattr(given, name), *sources, PUBLISHED.get(name))
        value = next((value for value in values if value is not None), None)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{option(name)}={value} must be positive and finite")
        return value

    noise_scale = config.get("noise_scale", {})
    # A run that measures nothing needs no samples, as in its own check.
    recorded_min = noise_scale.get("min_samples") if noise_scale.get("geometries", True) else 1
    sizes = policy.sizes_for(
        policy,
        num_ranks=chosen("num_ranks", split.get("num_ranks")),
        micro_batch_size=chosen("micro_batch_size", config.get("micro_batch_size")),
        min_samples=chosen("min_samples", recorded_min, 8),
    )
    sizes.require(policy.initial, "--initial")
    return ReplaySettings(
        batch_size=policy,
        sizes=sizes,
        smoothing=SmoothingSettings(**noise_scale.get("smoothing", {})),
        schedule=ScheduleSettings(**config.get("schedule", {})),
        token_budget=chosen("token_budget", config.get("token_budget")),
        sequence_length=chosen("sequence_length", split.get("sequence_length")),
        peak_lr=chosen("peak_lr", config.get("optimizer", {}).get("lr")),
    )


def first_split(history: History) -> dict[str, int]:
    """Ranks and sequence length, as far as the first step tells them."""
    first, record = history.rows[0], history.first
    found = {}
    if first.step == 1 and first.tokens and first.batch_size:
        found["sequence_length"] = first.tokens // first.batch_size
    if record:
        found["num_ranks"] = record["batch_size"] // (
            record["micro_batch_size"] * record["accumulation"]
        )
    return found


AS_RECORDED = SmoothingSettings(noise_decay=0.0, signal_decay=0.0)


def replay(history: History, settings: ReplaySettings) -> list[Replayed]:
    """Every recorded step, with what the policy does there, until it has spent the budget."""
    initial, length = settings.batch_size.initial, settings.sequence_length
    total_steps = steps_in_budget(settings.token_budget, batch_size=initial, sequence_length=length)
    sizer = replayed_sizer(history, settings, total_steps)
    policy = sizer.followed.policy
    schedule = Schedule(settings.schedule, initial, total_steps)
    rows = {row.step: row for row in history.rows}
    batch_size, multiplier, samples, target = initial, 1.0, 0, None
    path = []
    for step in range(1, history.rows[-1].step + 1):
        if samples * length >= settings.token_budget:
            break
        position = Position.after(
            step - 1,
            samples=samples,
            tokens=samples * length,
            token_budget=settings.token_budget,
            sequence_length=length,
        )
        wanted = policy.target(position, sizer.noise_for(sizer.followed))
        target = target if wanted is None else wanted
        decision, _ = sizer.decide(position, batch_size)
        if decision:
            batch_size, multiplier = decision.split.batch_size, decision.lr_multiplier
        peak = settings.peak_lr
        lr = None if peak is None else peak * (schedule.factor(samples) * multiplier)
        samples += batch_size
        if step in rows:
            path.append(Replayed(rows[step], batch_size, samples * length, lr, target))
        if step in history.measurements:
            sizer.observe([history.measurements[step]])
    last = path[-1].row.step if path else 0
    over = [row for row in history.rows if row.step > last]
    return path + [Replayed(row, None, None, None, None) for row in over]


def replayed_sizer(history: History, settings: ReplaySettings, total_steps: int) -> BatchSizer:
    """The policy to replay; averages that were recorded are taken as they are."""
    policy = settings.batch_size
    controller = Controller(
        "replay",
        policy.kind(policy, initial_batch_size=policy.initial, total_steps=total_steps),
        settings.sizes,
    )
    return BatchSizer([controller], AS_RECORDED if history.averaged else settings.smoothing)


def asked_of_record(policy: BatchSizeSettings) -> dict[str, Any]:
    """Which measurements to read: recorded averages serve a policy without decays of its own."""
    raw = policy.policy == "norm_test" or (policy.noise_decay, policy.signal_decay) != (None, None)
    return {"reads": policy.reads, "raw": raw}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gns_pretrain.results.replay",
        description="Replay a batch-size policy on a recorded run, side by side with the run.",
        epilog="Exit code: 0 the same path, 1 another one (the first row is named), 2 bad input.",
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    try:
        config = run_config(given.file)
        # The record tells the first size, and 1 lets any plan pass until it has been read.
        asked = asked_of_record(policy_settings(given, config, initial=1))
        history = read_history(given.file, **asked, run=given.run)
        settings = settings_for(given, config, history)
        path = replay(history, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(as_json(path)))
    else:
        for line in [*history.notes, str(settings), *side_by_side(path, every_row=given.every_row)]:
            print(line)
        print(verdict(path))
    return 0 if first_difference(path) is None else 1


if __name__ == "__main__":
    sys.exit(main())
