"""What is measured, how often, and how it is averaged."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import MODES
from gns_pretrain.noise_scale.geometries import ESTIMATES, check_estimate
from gns_pretrain.noise_scale.smoothing import SmoothingSettings

PARAMETERS = ("all", "block_matrices")
NUCLEAR_PARAMETERS = ("block_matrices", "all_2d")


@dataclass
class NoiseScaleSettings:
    """Settings of the noise scale's measurement; no geometry measures nothing."""

    geometries: list[str] = field(default_factory=list)  # euclidean, manhattan, nuclear
    estimates: list[str] = field(default_factory=lambda: ["plug_in"])  # the paper's comes first
    every_steps: int = 100  # F; at step 1 and every F steps; the paper's value
    min_samples: int = 8  # micro-batches that a step keeps where a policy changes the batch; ours
    parameters: str = "all"  # of Euclidean and Manhattan: all | block_matrices
    nuclear_parameters: str = "block_matrices"  # block_matrices | all_2d (the authors' code)
    nuclear_local_batch_factor: bool = False  # the authors' code: noise scale x local batch size
    square_root: str = "auto"  # auto | iterative | exact, of tr C^(1/2) and the nuclear norm
    per_kind: bool = False  # also log noise and signal by kind of parameter
    per_layer: bool = False  # also log noise and signal by block
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        self._check_geometries_and_estimates()
        if self.every_steps < 1:
            raise InputError(
                f"noise_scale.every_steps={self.every_steps} must be at least 1 step; "
                "the paper measures every 100"
            )
        if self.min_samples < 2:
            raise InputError(
                f"noise_scale.min_samples={self.min_samples} must be at least 2: a noise scale "
                "compares micro-batches; 8 keeps the bias of the paper's estimate near 7 %"
            )
        for name, choices in (
            ("parameters", PARAMETERS),
            ("nuclear_parameters", NUCLEAR_PARAMETERS),
            ("square_root", MODES),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"noise_scale.{name}={getattr(self, name)} is not known; "
                    f"use one of {', '.join(choices)}"
                )

    def _check_geometries_and_estimates(self) -> None:
        for name in ("geometries", "estimates"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(
                    f"noise_scale.{name}={listed(given)} names one twice, which would be measured, "
                    f"written and averaged twice; use {listed(dict.fromkeys(given))}"
                )
        if self.geometries and not self.estimates:
            raise InputError("noise_scale.estimates=[] names none; use [plug_in], the paper's")
        for geometry in self.geometries:
            for estimate in self.estimates_of(geometry):
                check_estimate(geometry, estimate)
            if not self.estimates_of(geometry):
                raise InputError(
                    f"noise_scale.estimates={listed(self.estimates)} leaves geometry {geometry} "
                    f"nothing to measure; add {' or '.join(ESTIMATES[geometry])}, or leave it out"
                )

    def estimates_of(self, geometry: str) -> list[str]:
        """The estimates asked for, less those that a geometry has no equation for."""
        return [e for e in self.estimates if (geometry, e) != ("nuclear", "debiased")]

    def measures_at(self, step: int) -> bool:
        """Whether the noise scale is measured in a step, counted from 1."""
        return bool(self.geometries) and (step == 1 or step % self.every_steps == 0)


def listed(names: Iterable[str]) -> str:
    """Names as they are written on the command line."""
    return f"[{', '.join(names)}]"
