"""Settings of the group `metrics`: what is shown where. metrics.jsonl is always written."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, one_of


@dataclass
class WandbSettings(Settings):
    """A Weights & Biases view of the run; ours, chosen for comparing runs of one study."""

    section: ClassVar[str] = "metrics.wandb"

    enabled: bool = False
    project: str | None = None  # one study; null: $WANDB_PROJECT, or gns-pretrain
    entity: str | None = None  # user or team; null: the account's default
    group: str | None = None  # runs that differ in the seed alone; null: none
    job_type: str | None = None  # e.g. train, measure; null: none
    tags: list[str] = field(default_factory=list)
    # offline: upload later with `wandb sync`; null: $WANDB_MODE or what `wandb offline` has set, or
    # online
    mode: Annotated[str | None, one_of("online", "offline", "disabled")] = None
    name: str | None = None  # shown in the web; null: the run directory's name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.project == "":
            raise InputError(
                "metrics.wandb.project is empty, but W&B sorts runs by project; give it a name"
            )


@dataclass
class MetricsSettings(Settings):
    """How often and where a run's numbers are shown; ours."""

    section: ClassVar[str] = "metrics"

    log_every: Annotated[int, at_least(1)] = 10  # optimizer steps between two console lines
    # Progress bar: auto shows it on a terminal. YAML reads a bare `on` or `off` as a boolean,
    # therefore other words.
    progress: Annotated[str, one_of("auto", "always", "never")] = "auto"
    tensorboard: bool = False  # event files in the run directory
    wandb: WandbSettings = field(default_factory=WandbSettings)
