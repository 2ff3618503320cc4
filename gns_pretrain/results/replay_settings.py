"""Settings of a replay: the published runs', or a run's own, with the command's options on top."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policy_settings import (
    LR_SCALINGS,
    OWN_VALUES,
    POLICIES,
    ROUNDINGS,
    TARGETS,
)
from gns_pretrain.batch_size.settings import BatchSizeSettings
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.measurement import ESTIMATES
from gns_pretrain.noise_scale.smoothing import SmoothingSettings
from gns_pretrain.results.reading import History
from gns_pretrain.schedule import ScheduleSettings

ESTIMATE_NAMES = sorted({name for names in ESTIMATES.values() for name in names})

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
    ("policy", str, POLICIES, "what chooses the batch size"),
    ("theta", float, None, "tolerated noise-to-signal ratio; eta of the norm test"),
    ("target", str, TARGETS, "how a noise scale becomes a batch size"),
    ("kappa", float, None, "share of the largest gain, for --target kappa"),
    ("geometry", str, tuple(ESTIMATES), "whose noise scale"),
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
        values |= dict.fromkeys(OWN_VALUES)  # the norm test has its own
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
