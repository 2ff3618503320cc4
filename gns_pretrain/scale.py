"""What a scale knows: every number of the paper's tables that depends on the size of the runs.

Experiments set roles ("from the small batch", "at Signum's tuned learning rate") and read the
numbers from here: `${scale.small_batch}`, `${scale.signum.lr}`. A number that nobody has found yet
is missing (???), and only a run that needs it asks for it.
"""

from dataclasses import dataclass, field

from omegaconf import II, MISSING


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
