"""All settings of a run, and their schema for Hydra.

Each group's dataclass stands beside the code that it configures and checks itself; this module
puts them together, and rules.py checks what only the whole can tell, before anything starts.
"""

import math
import re
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import II, MISSING, OmegaConf

from gns_pretrain.batch_size.settings import BatchSizeSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim import OPTIMIZERS, OptimizerSettings
from gns_pretrain.parallel.mesh import ParallelSettings
from gns_pretrain.runs.identity import changes_run_name
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.schedule import ScheduleSettings

# What a scale knows: every number of the paper's tables that depends on the size of the runs.
#
# Experiments set roles ("from the small batch", "at Signum's tuned learning rate") and read the
# numbers from here: `${scale.small_batch}`, `${scale.signum.lr}`. A number that nobody has found
# yet is missing (???), and only a run that needs it asks for it.


@dataclass
class SignSGDScale:
    """Tuned for signSGD."""

    lr: float | None = MISSING  # peak


@dataclass
class SignumScale:
    """Tuned for Signum."""

    lr: float | None = MISSING  # peak
    momentum: float | None = MISSING
    micro_batch_max: int | None = II("scale.micro_batch_max")  # where its published run differs


@dataclass
class AdamWScale:
    """Tuned for AdamW."""

    lr: float | None = MISSING  # peak
    beta1: float | None = MISSING
    beta2: float | None = MISSING


@dataclass
class SpecSGDScale:
    """Tuned for specSGD; AdamW, for what is no block matrix, has its own learning rate."""

    lr: float | None = MISSING  # peak of the matrices
    adamw_lr: float | None = MISSING  # peak of the rest


@dataclass
class MuonScale:
    """Tuned for Muon; likewise."""

    lr: float | None = MISSING
    momentum: float | None = MISSING
    adamw_lr: float | None = MISSING
    micro_batch_max: int | None = II("scale.micro_batch_max")  # likewise


@dataclass
class ScaleSettings:
    """The size of a study. Batch sizes are in sequences over all ranks."""

    name: str | None = MISSING  # in run names: demo, h200, paper, ...
    small_batch: int | None = MISSING  # the paper's 64
    middle_batch: int | None = MISSING  # its 128
    large_batch: int | None = MISSING  # its 256
    constant_micro_batch: int | None = MISSING  # where nothing is measured: what runs fastest
    micro_batch_max: int | None = None  # a growing micro-batch's largest; null: its shape stays
    seeds: str = "0"  # of a sweep, as Hydra sweeps them: 0 or 0,1,2 or range(0,10)
    theta: float = 0.6  # of the optimizer's own geometry; the paper's
    theta_low: float = 0.5  # of its theta sensitivity
    theta_high: float = 0.7
    euclidean_theta: float = 0.3  # of the Euclidean scale; its Table 9's
    table3: str | None = None  # scale of Table 3's larger model; null: this one
    signsgd: SignSGDScale = field(default_factory=SignSGDScale)
    signum: SignumScale = field(default_factory=SignumScale)
    adamw: AdamWScale = field(default_factory=AdamWScale)
    specsgd: SpecSGDScale = field(default_factory=SpecSGDScale)
    muon: MuonScale = field(default_factory=MuonScale)


CHOICES = {
    "precision": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "always", "never"),
    "resume": ("auto", "never"),
}


@dataclass
class LaunchSettings:
    """How many processes, and on what."""

    nproc_per_node: int = 1  # ranks that this command starts on this machine
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda
    threads: int | None = None  # of a rank on the CPU; null shares the cores among the ranks
    compile_cache: str | None = None  # folder that keeps compiled kernels between starts; null: no

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        for name in ("nproc_per_node", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"launch.{name}={value} must be at least 1")


@dataclass
class Config:
    """The whole configuration of `python train.py`."""

    run_name: str = MISSING  # folder under output_directory; the same on every rank, no time in it
    output_directory: str = "outputs"
    resume: str = "auto"  # auto: go on where the run was | never: start over in a fresh folder
    seed: int = 0  # of the weights and of the data's order
    table: str | None = None  # of the paper, that this run belongs to; null: none
    cell: str | None = None  # its place in that table
    token_budget: int = MISSING  # tokens; the run ends with the first whole step that reaches it
    micro_batch_size: int = MISSING  # sequences that a rank takes through the model at once
    gradient_clip: float | None = 1.0  # joint norm; the paper's value; null clips nothing
    precision: str = "auto"  # of the compute copies: auto (bfloat16 on GPUs) | float32 | bfloat16
    compile: str = "auto"  # torch.compile each block: auto (on GPUs) | always | never
    model: LlamaConfig = MISSING
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    noise_scale: NoiseScaleSettings = field(default_factory=NoiseScaleSettings)
    batch_size: BatchSizeSettings = field(default_factory=BatchSizeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)

    def __post_init__(self) -> None:
        """Check the top-level settings by themselves."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", self.run_name):
            raise InputError(
                f"run_name={self.run_name!r} is a folder's name; use letters, digits and ._=,+- "
                "and begin with a letter or a digit"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name}={getattr(self, name)} is not known; use one of {', '.join(choices)}"
                )
        for name in ("token_budget", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.gradient_clip is not None and not 0.0 < self.gradient_clip < math.inf:
            raise InputError(
                f"gradient_clip={self.gradient_clip} must be positive and finite; "
                "null clips nothing"
            )
        if self.table == "table3" and self.scale.table3 not in (None, self.scale.name):
            raise InputError(
                f"scale={self.scale.name} is not of Table 3's larger model; "
                f"use scale={self.scale.table3}"
            )


def overridden(policy: str) -> str:
    """The settings on the command line that make this run another one: `-optimizer.lr=0.001`.

    Experiments end their run_name with it, `${overridden:${batch_size.policy}}`, so that whatever
    is swept has a folder of its own. Their own choice, the scale and the seed stand in the name
    already; what changes only how and where a run computes stays out of it.
    """
    if not HydraConfig.initialized():
        return ""
    named = ("experiment", "sweep", "scale", "seed", "run_name")
    words = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
    own = sorted(
        word
        for word in words
        if (key := word.split("=")[0]) not in named
        and (key.startswith("scale.") or changes_run_name(key, policy=policy))
    )
    return "".join("-" + re.sub(r"[^A-Za-z0-9._=,+-]", "", word) for word in own)


def register_schemas() -> None:
    """Tell Hydra the dataclasses; each group's YAML files begin from their schema."""
    OmegaConf.register_new_resolver("overridden", overridden, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema_train", node=Config)
    for group, name, node in (
        ("model", "schema_llama", LlamaConfig),
        ("data", "schema_data", DataSettings),
        *(("optimizer", f"schema_{name}", settings) for name, settings in OPTIMIZERS.items()),
        ("schedule", "schema_schedule", ScheduleSettings),
        ("noise_scale", "schema_noise_scale", NoiseScaleSettings),
        ("batch_size", "schema_batch_size", BatchSizeSettings),
        ("parallel", "schema_parallel", ParallelSettings),
        ("metrics", "schema_metrics", MetricsSettings),
    ):
        store.store(group=group, name=name, node=node)
