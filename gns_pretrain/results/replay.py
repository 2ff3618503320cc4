"""What a batch-size policy chooses on a recorded run's noise scale, beside what the run did.

gns-pretrain replay FILE [--theta 0.6] ...

FILE is the record of a run, ours or somebody else's:

    published curve   CSV: _step, n_tokens_seen, batch_size/global_batch_size, lr,
                      adaptive_batch_metrics/gns_ema
    W&B export        CSV: a run's history with the same names, or with those that our runs log
                      (trainer/step, train/lr, noise/<geometry>/<estimate>/...), or a panel's
                      export, whose columns begin with the run's name
    metrics.jsonl     ours, or the run directory that has it

Columns and rows may be missing: what is there is compared. The settings are those of the published
signSGD runs (arXiv:2602.03001, Figure 3), or of the config.yaml beside a metrics.jsonl, unless an
option sets them. The replay counts its own sequences, step by step, from nothing but the noise
scale. Exit code: 0 the same path, 1 another one, 2 bad input.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from gns_pretrain import fields
from gns_pretrain.batch_size import AdaptiveBatchSize, BatchSizeSettings
from gns_pretrain.batch_size.policies import Policy
from gns_pretrain.errors import InputError, counted, print_error
from gns_pretrain.fields import About, positive
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import SmoothingSettings
from gns_pretrain.runs.directory import METRICS, read_settings
from gns_pretrain.system.terminal import write
from gns_pretrain.training.schedule import Schedule, ScheduleSettings, steps_in_budget

if TYPE_CHECKING:
    from pandas import DataFrame

    from gns_pretrain.results.frame import Noise

AS_RECORDED = SmoothingSettings(noise_decay=0.0, signal_decay=0.0)
LEARNING_RATE_TOLERANCE = 1e-9  # relative
PATH = ("batch_size", "tokens", "lr")  # what is compared

# ---- the record


@dataclass
class RecordedRun:
    """A record, ready to be replayed.

    `steps` has a row for each step, ascending, NaN where the record holds nothing: `where` it
    stands in the file, `batch_size` (sequences), `tokens` consumed when it was done, `lr`, and in
    a metrics.jsonl `micro_batch_size`, `accumulation` and `step_seconds`.
    """

    steps: "DataFrame"
    # Of one geometry and estimate, by the step at whose end they were read.
    measurements: dict[int, Measurement]
    averaged: bool  # they are the record's own averages, not to be averaged once more
    notes: list[str]  # what a reader should know about the file


def read_run(
    path: Path, *, reads: "Noise | None", raw: bool, run: str | None = None
) -> RecordedRun:
    """Read a CSV or a metrics.jsonl.

    Args:
        path: ends in .jsonl, or holds a CSV.
        reads: geometry and estimate of the noise scale to take; None to take none.
        raw: take single measurements, to average them anew, instead of the record's own averages.
        run: of a panel's export that holds several.

    Raises:
        InputError: the file cannot be read, or lacks what a replay needs.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; name a CSV, a metrics.jsonl or a run")
    from gns_pretrain.results import frame

    ours = path.suffix == ".jsonl"
    record = frame.read_jsonl(path) if ours else frame.read_csv(path, run)
    record.require("step")
    noise, notes = [], []
    # Gains are averaged over a window, and not what is fitted to them: a record has single ones.
    is_nested = reads is not None and reads[1] == "nested"
    if reads and (not ours or frame.noise_column(reads, "noise") in record.lines):
        noise = record.gain_columns(reads) if is_nested else record.noise_columns(reads, raw=raw)
        if noise == [frame.PUBLISHED_AVERAGE]:
            notes.append(
                f"the file does not say whose noise scale {noise[0]} is; taken as {' '.join(reads)}"
            )
    record.require("batch_size")
    lines = record.lines[~record.lines["kind"].isin(["validation", "batch_size"])]
    lines = lines.reindex(columns=lines.columns.union(["tokens", "lr"], sort=False))
    for column in ("step", "batch_size", "tokens"):
        may_be_empty = lines[column].isna() & (column != "step")
        for line in lines[(lines[column] % 1 != 0) & ~may_be_empty].to_dict("records"):
            problem = f"{line[column]} and not a whole number"
            if math.isnan(line[column]):
                problem = "empty; every row needs its step"
            raise InputError(f"{path}, {line['where']}: {record.name_of(column)} is {problem}")
    for line in lines[lines["step"] < 1].to_dict("records"):
        notes.append(
            f"{line['where']}: step {line['step']:.0f} comes before the first one; left out"
        )
    lines = lines[lines["step"] >= 1].astype({"step": int}).set_index("step", drop=False)
    steps = lines[lines["kind"] != "noise"]
    counts = frame.unrepeated(steps.index)
    if len(again := steps.index[~counts]):
        notes.append(
            f"steps {again[0]:,} to {again[-1]:,} come twice, as in a run that was resumed: the "
            "later rows count"
        )
    if steps["batch_size"].isna().all():
        raise InputError(
            f"{path} holds no batch size to compare with; name the metrics.jsonl of a run, or "
            "export the run once more"
        )
    steps = steps[counts]
    measurements = {}
    if reads and noise:
        measured = steps  # a CSV has all in one row
        if ours:
            measured = lines[lines["kind"] == "noise"].set_index(frame.READ_AT)
        measured = measured[noise].dropna()
        measured = measured[frame.unrepeated(measured.index)]
        for step, *values in measured.itertuples():
            if is_nested:
                gains, num_samples, of_step = tuple(values[:-2]), *map(int, values[-2:])
                size = int(steps["batch_size"][of_step])
                measurements[step] = Measurement(*reads, 0.0, 0.0, num_samples, size, gains)
            else:
                top, bottom = (*values, 1.0)[:2]
                measurements[step] = Measurement(*reads, top, bottom, 0, 0)
    return RecordedRun(steps, measurements, not raw, notes)


# ---- settings: the published runs', or a run's own, with the command's options on top

# The policy of the published signSGD runs, as Figure 3's files show it.
PUBLISHED_POLICY: dict[str, Any] = {
    "policy": "adaptive",
    "initial": 64,
    "micro_batch_max": 16,
    "micro_batch_step": 4,
}


@dataclass
class RunSettings(fields.Settings):
    """What a replay needs to know of the run; the defaults are the published signSGD runs'."""

    section: ClassVar[str] = "--"

    num_ranks: Annotated[int, About("data-parallel ranks"), positive()] = 8
    micro_batch_size: Annotated[int, About("smallest micro-batch, sequences"), positive()] = 8
    min_samples: Annotated[int, About("micro-batches that a step has at least"), positive()] = 8
    token_budget: Annotated[int, About("tokens of the run"), positive()] = 3_200_000_000
    sequence_length: Annotated[int, About("tokens of a sequence"), positive()] = 2048
    peak_lr: Annotated[float, About("learning rate before schedule and multiplier"), positive()] = (
        3e-3
    )


@dataclass(frozen=True)
class ReplaySettings:
    """Everything that a replay follows beside the recorded noise scale."""

    batch_size: BatchSizeSettings
    smoothing: SmoothingSettings
    schedule: ScheduleSettings
    run: RunSettings

    def __str__(self) -> str:
        policy = self.batch_size
        noise, decides = "", ""
        if policy.reads:
            by_theta = policy.policy == "norm_test" or policy.target == "theta"
            aim = f"theta {policy.theta:g}" if by_theta else policy.target
            if policy.kind.weighs_seconds:
                aim = "the seconds of the recorded steps"
            if policy.policy == "progress":
                aim = f"price {policy.price:g}"
            noise = f" on {' '.join(policy.reads)}, {aim}"
            decides = f"; decides every {counted(policy.decide_every_steps, 'step')}"
        if policy.policy in ("adaptive", "goodput", "progress"):
            decides += f" after {policy.warmup_fraction:.0%} of {self.run.token_budget:,} tokens"
        return (
            f"{policy.policy}{noise}, rounded {policy.rounding}, from {policy.initial} on "
            f"{self.adaptive(self.smoothing).followed.sizes}{decides}"
        )

    def adaptive(self, smoothing: SmoothingSettings) -> AdaptiveBatchSize:
        """What chooses the batch size, before the first step.

        Raises:
            InputError: settings that do not fit one another.
        """
        run, policy = self.run, self.batch_size
        return AdaptiveBatchSize(
            policy,
            batch_size=policy.initial,
            micro_batch_size=run.micro_batch_size,
            num_ranks=run.num_ranks,
            total_samples=-(-run.token_budget // run.sequence_length),
            tokens_per_sample=run.sequence_length,
            micro_batch_max=policy.micro_batch_max,
            micro_batch_step=policy.micro_batch_step,
            min_samples=run.min_samples,
            lr_decay=self.lr_schedule.decay,
            smoothing=smoothing,
        )

    @property
    def lr_schedule(self) -> Schedule:
        """What the learning rate follows."""
        run, initial = self.run, self.batch_size.initial
        total_steps = steps_in_budget(
            run.token_budget, batch_size=initial, sequence_length=run.sequence_length
        )
        return Schedule(self.schedule, initial, total_steps)


def policy_settings(
    options: dict[str, Any], config: dict[str, Any], *, initial: int | None
) -> BatchSizeSettings:
    """The policy to replay; a constant run has nothing to replay, and gets the adaptive one.

    `initial` is the first batch size of the record (sequences), None where it holds none.
    """
    values = dict(config.get("batch_size") or PUBLISHED_POLICY) | {"shadows": []}
    if values.get("policy", "constant") == "constant":
        values["policy"] = "adaptive"
    if initial is not None:
        values["initial"] = initial
    replayed = options.get("policy", values["policy"])
    if (replayed == "norm_test") != (values["policy"] == "norm_test"):
        values |= dict.fromkeys(Policy.own_values)  # the norm test has its own
    return fields.from_options(BatchSizeSettings, argparse.Namespace(**(values | options)))


def replay_settings(
    options: dict[str, Any], config: dict[str, Any], recorded: RecordedRun
) -> ReplaySettings:
    """Put together options, the run's settings, what its first step shows, and the published runs'.

    `options` are those that were given, by field; `config` has the run's settings, nested, and is
    empty for a file without any.

    Raises:
        InputError: a setting is out of its bounds, or settings do not fit one another.
    """
    first = {name: value for name, value in recorded.steps.iloc[0].items() if value == value}
    initial = first.get("batch_size")
    policy = policy_settings(options, config, initial=initial and int(initial))
    if policy.reads and not recorded.measurements:
        raise InputError(
            f"the file holds no measurement of geometry {policy.reads[0]}, estimate "
            f"{policy.reads[1]}; name one that was measured with --geometry and --estimate"
        )
    if policy.kind.weighs_seconds and "step_seconds" not in recorded.steps:
        raise InputError(
            f"policy {policy.policy} weighs the seconds of steps, and the file holds none; replay "
            "the metrics.jsonl of a run"
        )
    noise_scale = config.get("noise_scale", {})
    measures = noise_scale.get("geometries", True)
    known = {
        "micro_batch_size": config.get("micro_batch_size"),
        # A run that measures nothing needs no samples, as in its own check.
        "min_samples": noise_scale.get("min_samples") if measures else 1,
        "token_budget": config.get("token_budget"),
        "peak_lr": config.get("optimizer", {}).get("lr"),
    }
    if recorded.steps.index[0] == 1 and first.get("tokens") and initial:
        known["sequence_length"] = int(first["tokens"] // initial)
    if initial and first.get("accumulation") and first.get("micro_batch_size"):
        known["num_ranks"] = int(initial // (first["micro_batch_size"] * first["accumulation"]))
    known = {name: value for name, value in known.items() if value is not None}
    run = fields.from_options(RunSettings, argparse.Namespace(**(known | options)))
    settings = ReplaySettings(
        batch_size=policy,
        smoothing=SmoothingSettings(**noise_scale.get("smoothing", {})),
        schedule=ScheduleSettings(**config.get("schedule", {})),
        run=run,
    )
    settings.adaptive(settings.smoothing).followed.sizes.require(policy.initial, "--initial")
    return settings


# ---- the replay


def replay(recorded: RecordedRun, settings: ReplaySettings) -> "DataFrame":
    """Put beside each recorded step what the policy does there, until it has spent the budget.

    Returns:
        The recorded steps with `replayed_batch_size`, `replayed_tokens`, `replayed_lr`, `target`
        (of the last decision that was taken, sequences), all NaN where there is none;
        `lr_error`, relative; and `difference`, what differs first, empty if nothing does.
    """
    run = settings.run
    adaptive = settings.adaptive(AS_RECORDED if recorded.averaged else settings.smoothing)
    policy = adaptive.followed.policy
    schedule = settings.lr_schedule
    target, seconds_of = math.nan, dict[int, tuple[int, float]]()
    if adaptive.weighs_seconds:
        timed = recorded.steps[["batch_size", "step_seconds"]].dropna()
        seconds_of = {step: (int(size), took) for step, size, took in timed.itertuples()}
    replayed = dict.fromkeys(recorded.steps.index, (math.nan,) * 4)
    for step in range(1, recorded.steps.index[-1] + 1):
        if adaptive.tokens >= run.token_budget:
            break
        wanted = policy.target(adaptive.position, adaptive.noise_for(adaptive.followed))
        target = target if wanted is None else wanted
        adaptive.decide()
        lr = run.peak_lr * (schedule.factor(adaptive.samples) * adaptive.lr_multiplier)
        batch_size = adaptive.batch_size
        measured = recorded.measurements.get(step)
        adaptive.observe([measured] if measured else [])
        if (seconds := seconds_of.get(step)) is not None:
            adaptive.include_seconds(*seconds)
        if step in replayed:
            replayed[step] = (batch_size, adaptive.tokens, lr, target)
    path = recorded.steps.copy()
    path[[f"replayed_{name}" for name in PATH] + ["target"]] = list(replayed.values())
    scale = path["lr"].abs().replace(0.0, 1.0)
    path["lr_error"] = (path["replayed_lr"] - path["lr"]).abs() / scale
    path["difference"] = [_difference(row) for row in path.to_dict("records")]
    return path


def _difference(row: dict[str, Any]) -> str:
    if math.isnan(row["replayed_batch_size"]):
        return "the replay has reached its token budget before it"
    for name in ("batch_size", "tokens"):
        recorded, replayed = row[name], row[f"replayed_{name}"]
        if not math.isnan(recorded) and recorded != replayed:
            shown = f"{recorded:,.0f} in the file, {replayed:,.0f} in the replay"
            return f"{name.replace('_', ' ')} {shown}"
    if row["lr_error"] > LEARNING_RATE_TOLERANCE:
        return f"lr {row['lr']!r} in the file, {row['replayed_lr']!r} in the replay"
    return ""


# ---- the report


def first_difference(path: "DataFrame") -> str | None:
    """The first step that differs, named; None if none does."""
    for row in path[path["difference"] != ""].to_dict("records"):
        return f"first difference at step {row['step']:,} ({row['where']}): {row['difference']}"
    return None


def side_by_side(path: "DataFrame", *, every_row: bool) -> list[str]:
    """A table of the two paths: first, last and differing rows, and those where a batch changes."""
    sizes = path[["batch_size", "replayed_batch_size"]].fillna(0)
    shown = (sizes != sizes.shift()).any(axis=1)
    shown.iloc[-1] = True
    differs = path["difference"] != ""
    shown |= differs & (differs.cumsum() == 1)
    lines = [
        f"{'':>9} | {'in the file':^36} | {'replayed':^46}",
        f"{'step':>9} | {'batch':>6} {'tokens':>16} {'lr':>12} "
        f"| {'target':>9} {'batch':>6} {'tokens':>16} {'lr':>12}",
    ]

    def text(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    for row in path[shown | every_row].to_dict("records"):
        recorded, replayed = (
            f"{text(row[prefix + 'batch_size'], ',.0f'):>6} "
            f"{text(row[prefix + 'tokens'], ',.0f'):>16} {text(row[prefix + 'lr'], '.6e'):>12}"
            for prefix in ("", "replayed_")
        )
        mark = "   <- differs" if row["difference"] else ""
        target = text(row["target"], ",.1f")
        lines.append(f"{row['step']:>9,} | {recorded} | {target:>9} {replayed}{mark}")
    return lines


def verdict(path: "DataFrame") -> str:
    """One line on how the two paths compare."""
    if (difference := first_difference(path)) is not None:
        return difference
    known = path[list(PATH)].count()
    error = path["lr_error"].max()
    largest = "" if math.isnan(error) else f"; largest relative difference of lr {error:.1e}"
    return (
        f"the same path in {len(path):,} rows: batch size in {known['batch_size']:,}, tokens in "
        f"{known['tokens']:,}, lr in {known['lr']:,}{largest}"
    )


def as_json(path: "DataFrame") -> dict[str, Any]:
    """The two paths for another program."""
    whole = ("batch_size", "tokens", "replayed_batch_size", "replayed_tokens")
    rows = path.astype(dict.fromkeys(whole, "Int64")).astype(object).where(path.notna(), None)
    return {
        "rows": len(path),
        "first_difference": first_difference(path),
        "path": [
            {
                "step": row["step"],
                "recorded": {name: row[name] for name in PATH},
                "replayed": {name: row[f"replayed_{name}"] for name in PATH}
                | {"target": row["target"]},
            }
            for row in rows.to_dict("records")
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = fields.script_parser(__doc__)
    parser.add_argument(
        "file",
        type=fields.path_argument,
        help="published CSV, W&B export, metrics.jsonl or run directory",
    )
    fields.add_options(parser, BatchSizeSettings, skip=["shadows"], show_defaults=False)
    fields.add_options(parser, RunSettings)
    parser.add_argument("--run", help="of a panel's export that holds several runs")
    parser.add_argument("--every-row", action="store_true", help="print every row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    options = vars(given)
    try:
        file = given.file / METRICS if given.file.is_dir() else given.file
        config = read_settings(file.parent) if file.suffix == ".jsonl" else {}
        # The record has the first size, and 1 lets any plan pass until it has been read.
        policy = policy_settings(options, config, initial=1)
        # Recorded averages serve a policy without decays of its own.
        decays = (policy.noise_decay, policy.signal_decay)
        raw = policy.policy == "norm_test" or decays != (None, None)
        recorded = read_run(file, reads=policy.reads, raw=raw, run=given.run)
        settings = replay_settings(options, config, recorded)
        path = replay(recorded, settings)
    except InputError as error:
        return print_error(error)
    if given.json:
        write(json.dumps(as_json(path)))
    else:
        write(*recorded.notes, settings)
        write(*side_by_side(path, every_row=given.every_row), verdict(path))
    return 0 if first_difference(path) is None else 1


if __name__ == "__main__":
    sys.exit(main())
