"""All settings of a run, the schema that Hydra composes against.

Each group's dataclass stands beside the code that it configures and checks itself; checks.py has
the rules between groups, ranks and data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from omegaconf import II, MISSING

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.settings import BatchSizeSettings, PolicySettings, sizes_for
from gns_pretrain.data.dataset import DatasetSettings
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, at_most, one_of, path_name, positive
from gns_pretrain.model.kinds import MODELS
from gns_pretrain.model.settings import ModelSettings
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim import OPTIMIZERS, OptimizerSettings
from gns_pretrain.optim.averaging import AveragingSettings
from gns_pretrain.parallel.mesh import ParallelSettings
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.bad_steps import BadStepSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.training.initialize import InitSettings
from gns_pretrain.training.schedule import ScheduleSettings

# Of the groups whose files have different classes, these by the names of their schemas.
VARIANTS: dict[str, Mapping[str, type]] = {
    "model": MODELS,
    "data": {"data": DataSettings, "images": ImageDataSettings},
    "optimizer": OPTIMIZERS,
}
MAX_CORES = 4096  # more than any node has
RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._=,+-]*"
MAX_RUN_NAME = 200  # letters; file systems take 255, and temporary names are longer


@dataclass
class TunedSettings:
    """An optimizer's tuned numbers, as far as it has them; null: read by no role of this run."""

    lr: float | None = MISSING  # peak; of the block matrices, where the optimizer has two rates
    momentum: float | None = MISSING
    beta1: float | None = MISSING
    beta2: float | None = MISSING
    adamw_lr: float | None = MISSING  # peak of what is no block matrix
    micro_batch_max: int | None = II("scale.micro_batch_max")  # where the published run differs
    epochs: float | None = II("scale.epochs")  # of images, where the paper's run differs


@dataclass
class ScaleSettings:
    """The size of a study: every number of the paper's tables that depends on it.

    Cells set roles ("from the small batch", "at Signum's tuned learning rate") and read the numbers
    from here: `${scale.small_batch}`, `${scale.signum.lr}`. A number that nobody has found yet is
    missing (???), and only a run that needs it asks for it. Batch sizes are in samples over all
    ranks.
    """

    name: str | None = MISSING  # in run names: demo, h200, paper, ...
    workload: str = "language"  # what the numbers are for, as conf/workload names it
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
    epochs: float | None = None  # of a run on images, or
    sample_budget: int | None = None  # its images
    table3: str | None = None  # scale of Table 3's larger model; null: this one
    sgd: TunedSettings = field(default_factory=TunedSettings)
    sgd_momentum: TunedSettings = field(default_factory=TunedSettings)
    normalized_sgd: TunedSettings = field(default_factory=TunedSettings)
    signsgd: TunedSettings = field(default_factory=TunedSettings)
    signum: TunedSettings = field(default_factory=TunedSettings)
    adamw: TunedSettings = field(default_factory=TunedSettings)
    specsgd: TunedSettings = field(default_factory=TunedSettings)
    muon: TunedSettings = field(default_factory=TunedSettings)


@dataclass
class LaunchSettings(Settings):
    """How many processes, and on what."""

    section: ClassVar[str] = "launch"

    # ranks that this command starts here
    nproc_per_node: Annotated[int, at_least(1), at_most(MAX_CORES)] = 1
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda
    # of a CPU rank; null: its share of cores
    threads: Annotated[int | None, at_least(1), at_most(MAX_CORES)] = None
    # folder that keeps compiled kernels between starts; null: no
    compile_cache: Annotated[str | None, path_name()] = None


@dataclass
class Config(Settings):
    """The whole configuration of `gns-pretrain train`."""

    run_name: str = MISSING  # folder under output_directory; the same on every rank, no time in it
    # folder of all runs
    output_directory: Annotated[str, path_name()] = "outputs"
    # auto: resume the run | never: start it again in a fresh directory
    resume: Annotated[str, one_of("auto", "never")] = "auto"
    # check everything, show what would be trained, write nothing
    dry_run: bool = False
    # and train so many steps, in a folder that is deleted; a dry run's
    dry_run_steps: Annotated[int, at_least(0)] = 0
    seed: int = 0  # of the weights and of the data's order
    table: str | None = None  # of the paper, that this run belongs to; null: none
    cell: str | None = None  # its place in that table
    # tokens; a run on text ends with the first whole step that reaches it
    token_budget: Annotated[int | None, at_least(1)] = MISSING
    # passes over the images; a run on images ends with the first whole step that reaches them
    epochs: Annotated[float | None, positive()] = None
    # in place of epochs, images
    sample_budget: Annotated[int | None, at_least(1)] = None
    # samples that a rank takes through the model at once
    micro_batch_size: Annotated[int, at_least(1)] = MISSING
    # largest global gradient norm; the paper's value; null clips nothing
    gradient_clip: Annotated[float | None, positive(hint="null clips nothing")] = 1.0
    # of the compute copies of the weights: auto (bfloat16 on GPUs) | float32 | bfloat16
    precision: Annotated[str, one_of("auto", "float32", "bfloat16")] = "auto"
    # torch.compile each block: auto (on GPUs) | always | never
    compile: Annotated[str, one_of("auto", "always", "never")] = "auto"
    # what the run begins from; see `InitSettings`
    init: dict[str, Any] = field(default_factory=lambda: {"from": None, "what": "weights"})
    model: ModelSettings = MISSING
    data: DatasetSettings = field(default_factory=DatasetSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    bad_steps: BadStepSettings = field(default_factory=BadStepSettings)
    noise_scale: NoiseScaleSettings = field(default_factory=NoiseScaleSettings)
    batch_size: BatchSizeSettings = field(default_factory=BatchSizeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.initial  # checks itself
        if self.dry_run_steps and not self.dry_run:
            raise InputError(
                f"dry_run_steps={self.dry_run_steps} are those of a dry run; set dry_run=true too"
            )
        if not re.fullmatch(RUN_NAME, self.run_name):
            raise InputError(
                f"run_name={self.run_name!r} is a folder's name; use letters, digits and ._=,+- "
                "and begin with a letter or a digit"
            )
        if len(self.run_name) > MAX_RUN_NAME:
            raise InputError(
                f"run_name={self.run_name[:40]}... has {len(self.run_name)} letters, a folder's "
                f"name has at most {MAX_RUN_NAME}; give a shorter one, as in: run_name=..."
            )
        if self.table == "table3" and self.scale.table3 not in (None, self.scale.name):
            raise InputError(
                f"scale={self.scale.name} is not of Table 3's larger model; "
                f"use scale={self.scale.table3}"
            )

    @property
    def initial(self) -> InitSettings:
        """What the run begins from; InputError for a name that is none of its settings."""
        if unknown := self.init.keys() - {"from", "what"}:
            raise InputError(f"init.{min(unknown)}: there is no such setting; leave it out")
        return InitSettings(self.init.get("from"), self.init.get("what", "weights"))

    def dtype_on(self, device: str) -> str:
        """Name the dtype of the compute copies of the weights on `cpu` or `cuda`."""
        if self.precision == "auto":
            return "bfloat16" if device == "cuda" else "float32"
        return self.precision

    def compiles_on(self, device: str) -> bool:
        """Whether blocks are compiled on `cpu` or `cuda`."""
        return self.compile == "always" or (self.compile == "auto" and device == "cuda")

    @property
    def micro_batches(self) -> dict[str, Any]:
        """How micro-batches begin and grow, and how many a step has; arguments by their names."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_max": self.batch_size.micro_batch_max,
            "micro_batch_step": self.batch_size.micro_batch_step,
            "min_samples": self.noise_scale.min_samples if self.noise_scale.geometries else 1,
        }

    def feasible_sizes(self, policy: PolicySettings, *, num_ranks: int) -> FeasibleSizes:
        """Return the batch sizes that ranks can take under one of the run's policies."""
        names = {
            "micro_batch_max": "batch_size.micro_batch_max",
            "min_samples": "noise_scale.min_samples",
        }
        return sizes_for(policy, num_ranks=num_ranks, names=names, **self.micro_batches)
