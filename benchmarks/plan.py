"""What a run takes before it is started: memory, traffic, time and GPU-hours, from its own step.

Counts are those of the project's training step at full size, taken as one rank of N on a GPU that
is not there (`rehearsal`). Seconds follow from them by rates, which are settings (`costs`).
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from benchmarks.costs import GPUS_PER_NODE, Costs, Rates
from benchmarks.fake_gpu import Collective, Kernel, Recording
from benchmarks.harness import MODELS, OPTIMIZERS, Row, llama_of, model_config, text_of
from benchmarks.rehearsal import rehearsal
from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.config.schema import Config
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, at_least, one_of
from gns_pretrain.model.config import count_parameters
from gns_pretrain.model.flops import flops_per_token
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, shard_group_size

GEOMETRY_NAMES = ("manhattan", "nuclear")
# Of the card: CUDA's context, cuBLAS, NCCL, and what the caching allocator cannot use.
NOT_SEEN_GIB = 4.0
UNMEASURED = "unmeasured"
MEASURED_EVERY = 100  # F, where no configuration says it
# In the place of tuned numbers, of which time does not depend.
TUNED = [
    f"scale.{name}.{number}=0.5"
    for name in ("signsgd", "signum", "adamw", "specsgd", "muon")
    for number in ("lr", "momentum", "beta1", "beta2", "adamw_lr")
]

# Options of `plan` that the cells of a sweep have themselves.
OF_CELLS = (
    "model",
    "micro_batch_size",
    "accumulation",
    "sequence_length",
    "optimizer",
    "noise_scale",
    "cross_fitted",
    "read_after_steps",
    "token_budget",
)


@dataclass
class Plan(Rates):
    """Memory, traffic, time and GPU-hours of a run, a table or a sweep; needs no GPU."""

    model: Annotated[list[str], one_of(*MODELS), About("files in conf/model")] = field(
        default_factory=lambda: ["llama3_160m", "llama3_1b"]
    )
    gpus: Annotated[list[int], at_least(1), About("in all")] = field(
        default_factory=lambda: [8, 64]
    )
    parallel: Annotated[list[str], one_of("auto", "single", "fsdp", "hsdp"), About("layouts")] = (
        field(default_factory=lambda: ["auto"])
    )
    micro_batch_size: Annotated[int, at_least(1), About("sequences")] = 8
    accumulation: Annotated[int, at_least(1), About("micro-batches of a GPU's step")] = 1
    sequence_length: Annotated[int, at_least(1), About("tokens")] = 2048
    vocab_size: Annotated[int, at_least(1), About("tokens, where the data say")] = 128_256
    optimizer: Annotated[str, one_of(*OPTIMIZERS)] = "adamw"
    noise_scale: Annotated[list[str], one_of(*GEOMETRIES), About("geometries, each alone")] = field(
        default_factory=lambda: list(GEOMETRY_NAMES)
    )
    cross_fitted: Annotated[bool, About("with cross-fitted estimates")] = False
    read_after_steps: Annotated[int, at_least(0), About("noise_scale.read_after_steps")] = 0
    token_budget: Annotated[int | None, at_least(1), About("of a run, for its hours")] = None
    sweep: Annotated[str | None, About("a table of conf/tables.yaml, such as table2")] = None
    scale: Annotated[str, About("a file in conf/scale, with --sweep")] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.gpus:
            if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
                raise InputError(
                    f"--gpus={count} are not whole nodes of {GPUS_PER_NODE} GPUs; "
                    f"use a multiple of {GPUS_PER_NODE}"
                )
        if "single" in self.parallel and max(self.gpus) > 1:
            raise InputError(
                f"--parallel=single is one process, but --gpus={max(self.gpus)}; use --gpus 1, or "
                "--parallel auto, which is single on one GPU"
            )
        if self.sweep is not None:
            self._check_sweep()

    def _check_sweep(self) -> None:
        """Refuse options that a sweep would not follow."""
        defaults = Plan()
        for name in OF_CELLS:
            if getattr(self, name) != getattr(defaults, name):
                option = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{option} is each cell's own in --sweep={self.sweep}; leave it out"
                )
        for name in ("gpus", "parallel"):
            if (given := getattr(self, name)) != getattr(defaults, name) and len(given) > 1:
                raise InputError(f"--{name}={given} with --sweep={self.sweep}; give one")

    def run(self) -> Iterator[Row]:
        """Yield the plan of one run; of several, or of a sweep, one table with a row for each."""
        if self.sweep is not None:
            yield plan_of_sweep(self, self.sweep)
            return
        cases = [
            Case(self.config(name, kind), gpus, self.accumulation)
            for name in self.model
            for gpus in self.gpus
            for kind in self.parallel
        ]
        plans = (RunPlan(self, case, self.noise_scale) for case in cases)
        if len(cases) == 1:
            yield next(plans).details(self.token_budget)
        else:
            yield {"measured": "nothing", "runs": [plan.summary() for plan in plans]}

    def config(self, model: str, parallel: str) -> Config:
        """Return the settings of a run that trains a model on a layout."""
        return Config(
            run_name="plan",
            token_budget=1,
            micro_batch_size=self.micro_batch_size,
            model=model_config(model, self.vocab_size),
            optimizer=OPTIMIZERS[self.optimizer],
            data=DataSettings(sequence_length=self.sequence_length),
            parallel=ParallelSettings(kind=parallel),
            noise_scale=NoiseScaleSettings(
                read_after_steps=self.read_after_steps,
                estimates=["plug_in", "cross_fitted"] if self.cross_fitted else ["plug_in"],
            ),
        )


@dataclass(frozen=True)
class Case:
    """What a rehearsal is of."""

    config: Config
    gpus: int
    accumulation: int

    @property
    def layout(self) -> str:
        """FSDP2, or HSDP with its replicas and the GPUs of each."""
        parallel = self.config.parallel
        kind = parallel.resolved_kind(self.gpus)
        if kind != "hsdp":
            return {"single": "one GPU", "fsdp": "FSDP2"}[kind]
        shards = shard_group_size(
            parallel, num_ranks=self.gpus, ranks_per_node=min(self.gpus, GPUS_PER_NODE)
        )
        return f"HSDP {self.gpus // shards} x {shards}"

    @property
    def sequences(self) -> int:
        """Of a step, over all GPUs."""
        data_ranks = self.config.parallel.num_data_ranks(self.gpus)
        return self.config.micro_batch_size * self.accumulation * data_ranks

    @property
    def tokens(self) -> int:
        return self.sequences * text_of(self.config).sequence_length


class RunPlan:
    """The plan of one run: an unmeasured step and one measured in each geometry, with their costs.

    Args:
        geometries: names; a measured step measures one.
    """

    def __init__(self, rates: Rates, case: Case, geometries: Sequence[str]) -> None:
        self.rates, self.case = rates, case
        self.costs = Costs(rates, llama_of(case.config).dim)
        self.steps: dict[str, Recording] = {}
        with rehearsal(case.config, case.gpus, accumulation=case.accumulation) as run:
            self.steps[UNMEASURED] = run.step()
            for name in geometries:
                settings = dataclasses.replace(case.config.noise_scale, geometries=[name])
                self.steps[name] = run.step(settings)

    @property
    def seconds(self) -> float:
        """Of an unmeasured step."""
        return self.costs.step(self.steps[UNMEASURED])

    def extra_seconds(self, geometry: str) -> float:
        """What a measured step takes more."""
        return self.costs.step(self.steps[geometry]) - self.seconds

    @property
    def peak_gib(self) -> float:
        return max(recording.peak for recording in self.steps.values()) / 2**30

    @property
    def fits(self) -> bool:
        return self.peak_gib + NOT_SEEN_GIB <= self.rates.gpu_gibibytes

    def hours(self, token_budget: int, geometries: Sequence[str], every: int) -> float:
        """Of a run without evaluation, checkpoints and start, at one batch size."""
        steps = -(-token_budget // self.case.tokens)
        extra = sum(map(self.extra_seconds, geometries)) / every
        return steps * (self.seconds + extra) / 3600

    def shape(self) -> Row:
        """Return what the run is."""
        case = self.case
        return {
            "model": case.config.model.name,
            "gpus": case.gpus,
            "layout": case.layout,
            "micro_batch_size": case.config.micro_batch_size,
            "accumulation": case.accumulation,
        }

    def summary(self) -> Row:
        """Return a row of a table of several runs."""
        unmeasured = self.steps[UNMEASURED]
        row = self.shape() | {
            "peak_gib": round(self.peak_gib, 1),
            "fits": "yes" if self.fits else "no",
            "kernels_ms": round(1e3 * self.costs.device(unmeasured), 1),
            "wire_ms": round(1e3 * self.costs.interconnect(unmeasured), 1),
            "tokens/s_a_gpu": round(self.case.tokens / self.case.gpus / self.seconds),
        }
        for geometry in self.steps:
            if geometry != UNMEASURED:
                share = self.extra_seconds(geometry) / self.seconds
                row[f"{geometry}_F={MEASURED_EVERY}"] = f"{100 * share / MEASURED_EVERY:.2f} %"
        return row

    def details(self, token_budget: int | None) -> Row:
        """Return everything about the run; lists are tables."""
        case, unmeasured = self.case, self.steps[UNMEASURED]
        tokens_per_second = case.tokens / self.seconds
        flops = flops_per_token(llama_of(case.config), text_of(case.config).sequence_length)
        share = tokens_per_second / case.gpus * flops / 1e12 / self.rates.bfloat16_teraflops
        return {
            "measured": "nothing",
            **self.shape(),
            "parameters": count_parameters(llama_of(case.config)).total,
            "optimizer": case.config.optimizer.name,
            "sequences_a_step": case.sequences,
            "tokens_per_second_a_gpu": round(tokens_per_second / case.gpus),
            "tokens_per_second": round(tokens_per_second),
            "share_of_matmul_rate_percent": round(100 * share, 1),
            "peak_gib": round(self.peak_gib, 2),
            "fits": "yes" if self.fits else "no",
            "memory_at_the_peak": [
                {"of": holder, "gib": round(size / 2**30, 2)}
                for holder, size in max(
                    self.steps.values(), key=lambda r: r.peak
                ).held_at_peak.most_common()
                if size >= 2**20
            ],
            "steps": [self.counts(name) for name in self.steps],
            "times": [self.times(name, token_budget) for name in self.steps],
            "unmeasured_step": part_rows(self.costs, unmeasured.kernels),
            "collectives": [
                row
                for name, recording in self.steps.items()
                for row in collective_rows(self.costs, name, recording)
            ],
            "waits": [
                {"step": name, "host_waits_for": where, "times": count}
                for name, recording in self.steps.items()
                for where, count in recording.waits.items()
            ],
            "unordered_accesses": sum(r.races.total() for r in self.steps.values()),
        }

    def counts(self, name: str) -> Row:
        """Return what a step does."""
        recording = self.steps[name]
        return {
            "step": name,
            "launches": sum(kernel.launches for kernel in recording.kernels),
            "collectives": len(recording.collectives),
            "gb_sent": round(sum(c.sent for c in recording.collectives) / 1e9, 2),
            "waits": recording.waits.total(),
            "peak_gib": round(recording.peak / 2**30, 2),
        }

    def times(self, name: str, token_budget: int | None) -> Row:
        """Return a step's milliseconds; hours are of a run that takes it every F steps."""
        recording, costs = self.steps[name], self.costs
        extra = costs.step(recording) - self.seconds
        row: Row = {
            "step": name,
            "kernels_ms": round(1e3 * costs.device(recording), 1),
            "host_ms": round(1e3 * costs.host(recording), 1),
            "wire_ms": round(1e3 * costs.interconnect(recording), 1),
            "ms": round(1e3 * costs.step(recording), 1),
            f"cost_F={MEASURED_EVERY}": f"{100 * extra / self.seconds / MEASURED_EVERY:.2f} %",
        }
        if token_budget is not None:
            hours = self.hours(token_budget, [name], MEASURED_EVERY)
            row |= {"hours": round(hours, 2), "gpu_hours": round(hours * self.case.gpus, 1)}
        return row


def part_rows(costs: Costs, kernels: Sequence[Kernel]) -> list[Row]:
    """Return launches, memory traffic, FLOPs and time of each part of a step."""
    parts: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        parts[kernel.part].append(kernel)
    rows: list[Row] = [
        {
            "part": part,
            "launches": sum(kernel.launches for kernel in chosen),
            "gb": round(sum(kernel.bytes for kernel in chosen) / 1e9, 2),
            "tflop": round(sum(kernel.flops for kernel in chosen) / 1e12, 2),
            "ms": round(1e3 * sum(map(costs.kernel, chosen)), 2),
        }
        for part, chosen in parts.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def collective_rows(costs: Costs, step: str, recording: Recording) -> list[Row]:
    """Return count, bytes and time of the collectives of each part of a step."""
    alike: dict[tuple[str, str, int], list[Collective]] = defaultdict(list)
    for collective in recording.collectives:
        if step == UNMEASURED or collective.part == "measurement":
            alike[collective.part, collective.kind, len(collective.ranks)].append(collective)
    return [
        {
            "step": step,
            "of": part,
            "collective": kind,
            "gpus": ranks,
            "count": len(members),
            "gb_sent": round(sum(member.sent for member in members) / 1e9, 3),
            "ms": round(1e3 * sum(map(costs.collective, members)), 2),
        }
        for (part, kind, ranks), members in alike.items()
    ]


def plan_of_sweep(plan: Plan, table: str) -> Row:
    """Return hours of every run of a sweep, composed as train.py composes it.

    A run is planned at its first batch size; GPUs and layout are those of the scale, or one
    `--gpus` and one `--parallel`. Tuned numbers that nobody has found yet do not
    matter here.
    """
    rows: list[Row] = []
    known: dict[str, RunPlan] = {}
    for cell, config, count in cells_of(table, plan.scale):
        gpus = plan.gpus[0] if len(plan.gpus) == 1 else config.launch.nproc_per_node
        if plan.parallel != ["auto"]:
            config.parallel = ParallelSettings(kind=plan.parallel[0])
        config.model = llama_of(config).of_data(plan.vocab_size)
        _, policy = config.batch_size.policies[0]
        sizes = config.feasible_sizes(policy, num_ranks=config.parallel.num_data_ranks(gpus))
        split = sizes.require(config.batch_size.initial, "batch_size.initial")
        config.micro_batch_size = split.micro_batch_size
        case = Case(config, gpus, split.accumulation)
        geometries = config.noise_scale.geometries
        key = f"{config.optimizer.name} {split} {geometries}"
        if key not in known:
            known[key] = RunPlan(plan, case, geometries)
        assert config.token_budget is not None
        hours = known[key].hours(config.token_budget, geometries, config.noise_scale.every_steps)
        rows.append(
            {
                "cell": cell.split("/")[-1],
                "batch": config.batch_size.initial,
                "measured": ", ".join(geometries) or "nothing",
                "peak_gib": round(known[key].peak_gib, 1),
                "fits": "yes" if known[key].fits else "no",
                "runs": count,
                "hours": round(hours, 2),
                "gpu_hours": round(count * hours * gpus, 1),
            }
        )
    return {
        "measured": "nothing",
        "sweep": table,
        "scale": plan.scale,
        "runs": sum(row["runs"] for row in rows),
        "gpu_hours": round(sum(row["gpu_hours"] for row in rows), 1),
        "cells": rows,
    }


def cells_of(table: str, scale: str) -> list[tuple[str, Config, int]]:
    """Return the cells of `+sweep=TABLE scale=SCALE`: name, settings and number of runs."""
    register_configs()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        words = [f"+sweep={table}", f"scale={scale}"]
        try:
            swept = compose("train", words, return_hydra_config=True).hydra.sweeper.params
            parsed = OverridesParser.create().parse_overrides(
                [f"{k}={v}" for k, v in swept.items()]
            )
            values = {
                each.key_or_group: list(each.sweep_string_iterator())
                if each.is_sweep_override()
                else [each.get_value_element_as_str()]
                for each in parsed
            }
            cells = [
                (cell, [f"+experiment={cell}", f"scale={scale}", *TUNED])
                for cell in values.pop("experiment")
            ]
            composed = [(name, compose("train", given), given) for name, given in cells]
        except (HydraException, OmegaConfBaseException) as error:
            raise as_input_error(error, words) from error
    count = math.prod(map(len, values.values()))
    return [(name, settings_from(node, given[:2]), count) for name, node, given in composed]
