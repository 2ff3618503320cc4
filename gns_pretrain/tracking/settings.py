"""Settings of the group `metrics`: what is shown where. metrics.jsonl is always written."""

from dataclasses import dataclass, field

from gns_pretrain.errors import InputError

PROGRESS_CHOICES = ("auto", "always", "never")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class WandbSettings:
    """A Weights & Biases view of the run; ours, chosen for comparing runs of one study."""

    enabled: bool = False
    project: str = "gns-pretrain"  # one study
    entity: str | None = None  # user or team; null: the account's default
    group: str | None = None  # runs that differ in the seed alone; null: none
    job_type: str | None = None  # e.g. train, measure; null: none
    tags: list[str] = field(default_factory=list)
    mode: str = "online"  # online | offline (upload later with `wandb sync`) | disabled
    name: str | None = None  # shown in the web; null: the run directory's name

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise InputError(
                f"metrics.wandb.mode={self.mode} is unknown; use one of {', '.join(WANDB_MODES)}"
            )
        if not self.project:
            raise InputError(
                "metrics.wandb.project is empty, but W&B sorts runs by project; give it a name"
            )


@dataclass
class MetricsSettings:
    """How often and where a run's numbers are shown; ours."""

    log_every: int = 10  # optimizer steps between two console lines
    # Progress bar: auto shows it on a terminal. YAML reads a bare `on` or `off` as a boolean,
    # therefore other words.
    progress: str = "auto"
    tensorboard: bool = False  # event files under <run directory>/tensorboard
    wandb: WandbSettings = field(default_factory=WandbSettings)

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise InputError(
                f"metrics.log_every={self.log_every} is not a number of steps; use 1 or more"
            )
        if self.progress not in PROGRESS_CHOICES:
            raise InputError(
                f"metrics.progress={self.progress} is unknown; "
                f"use one of {', '.join(PROGRESS_CHOICES)}"
            )
