"""What is measured, how often, and how it is averaged."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, TypedDict

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, key_of, one_of, positive
from gns_pretrain.geometry.square_root import MODES
from gns_pretrain.model.roles import Role
from gns_pretrain.noise_scale.geometries import GEOMETRIES, fewest_samples
from gns_pretrain.noise_scale.sample_sums import Needs
from gns_pretrain.noise_scale.smoothing import SmoothingSettings

PARAMETERS = ("all", "block_matrices", "norms")
NUCLEAR_PARAMETERS = ("block_matrices", "all_2d")
COMPOSITE_RESTS = ("manhattan", "adam")
COMPOSITE_SUMS = ("roots", "squares")


class MeterOptions(TypedDict, total=False):
    """The fields of `NoiseScaleSettings` that `NoiseMeter` reads, as its keyword arguments."""

    geometries: list[str]
    estimates: list[str]
    every_steps: int
    read_after_steps: int
    parameters: str
    nuclear_parameters: str
    composite_rest: str
    composite_sum: str
    of_momentum: bool
    nuclear_local_batch_factor: bool
    square_root: str
    per_kind: bool
    per_layer: bool


@dataclass
class NoiseScaleSettings(Settings):
    """Settings of the noise scale's measurement; no geometry measures nothing."""

    section: ClassVar[str] = "noise_scale"

    # measured beside one another; an empty list measures nothing
    geometries: Annotated[list[str], key_of(GEOMETRIES)] = field(default_factory=list)
    estimates: list[str] = field(default_factory=lambda: ["plug_in"])  # the paper's comes first
    # F; at step 1 and every F steps; the paper's value
    every_steps: Annotated[int, at_least(1, "step", hint="the paper measures every 100")] = 100
    # in place of every_steps, of a run on images: passes over them; null: every_steps holds
    every_epochs: Annotated[float | None, positive()] = None
    # D; a step is read at the end of the D-th one after it: eigenvalues are taken meanwhile; ours
    read_after_steps: Annotated[int, at_least(0, "steps")] = 0
    # micro-batches that a step keeps where a policy changes the batch; ours
    min_samples: Annotated[
        int,
        at_least(
            2,
            hint="a noise scale compares micro-batches; 8 keeps the bias of the paper's estimate "
            "near 7 %",
        ),
    ] = 8
    # of Euclidean, Manhattan and adam; norms: gains and biases of norm layers (arXiv:2411.00999)
    parameters: Annotated[str, one_of(*PARAMETERS)] = "all"
    # all_2d: the authors' code
    nuclear_parameters: Annotated[str, one_of(*NUCLEAR_PARAMETERS)] = "block_matrices"
    nuclear_local_batch_factor: bool = False  # the authors' code: noise scale x local batch size
    # of composite: the geometry of what is no matrix
    composite_rest: Annotated[str, one_of(*COMPOSITE_RESTS)] = "manhattan"
    # of composite: matrices and the rest add up as roots of noise and signal, or as squares
    composite_sum: Annotated[str, one_of(*COMPOSITE_SUMS)] = "roots"
    # the noise of the optimizer's momentum, an average over steps, in place of one step's
    of_momentum: bool = False
    square_root: Annotated[str, one_of(*MODES)] = "auto"  # of tr C^(1/2) and the nuclear norm
    per_kind: bool = False  # also log noise and signal by kind of parameter
    per_layer: bool = False  # also log noise and signal by block
    smoothing: SmoothingSettings = field(default_factory=SmoothingSettings)

    def __post_init__(self) -> None:
        """Check each field, then that every geometry has something to measure, once."""
        for name in ("geometries", "estimates"):
            if isinstance(given := getattr(self, name), str):
                raise InputError(f"noise_scale.{name}={given} is one name; use a list: [{given}]")
        super().__post_init__()
        if self.read_after_steps >= self.every_steps:
            raise InputError(
                f"noise_scale.read_after_steps={self.read_after_steps} must be below "
                f"noise_scale.every_steps={self.every_steps}, so that a measurement is read before "
                "the next one"
            )
        for name in ("geometries", "estimates"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(
                    f"noise_scale.{name}={listed(given)} names one twice, which would be measured, "
                    f"written and averaged twice; use {listed(dict.fromkeys(given))}"
                )
        known = {estimate for geometry in GEOMETRIES.values() for estimate in geometry.estimates}
        for estimate in self.estimates:
            if estimate not in known:
                raise InputError(
                    f"noise_scale.estimates holds {estimate}, which no geometry has; use one of "
                    f"{', '.join(sorted(known))}"
                )
        if self.geometries and not self.estimates:
            raise InputError("noise_scale.estimates=[] names none; use [plug_in], the paper's")
        if self.min_samples < self.fewest_samples:
            raise InputError(
                f"noise_scale.min_samples={self.min_samples} is too few for "
                f"noise_scale.estimates={listed(self.estimates)}, of which nested takes an eighth "
                f"of the micro-batches of a step; use {self.fewest_samples}, or leave nested out"
            )
        for geometry in self.geometries:
            if not self.estimates_of(geometry):
                raise InputError(
                    f"noise_scale.estimates={listed(self.estimates)} leaves geometry {geometry} "
                    f"nothing to measure; add {' or '.join(GEOMETRIES[geometry].estimates)}, or "
                    "leave it out"
                )

        reading = [GEOMETRIES[name](self) for name in self.geometries]
        if (
            reading
            and self.parameters == "norms"
            and not any(
                geometry.looks_at(Role.NORM) and not geometry.looks_at(Role.EMBEDDING)
                for geometry in reading
            )
        ):
            raise InputError(
                f"noise_scale.parameters=norms is not read by noise_scale.geometries="
                f"{listed(self.geometries)}; use [euclidean], [manhattan] or [adam], or "
                "parameters=all"
            )

    def estimates_of(self, geometry: str) -> list[str]:
        """The estimates asked for, less those that a geometry has no equation for."""
        return [e for e in self.estimates if e in GEOMETRIES[geometry].estimates]

    @property
    def measured(self) -> list[tuple[str, str]]:
        return [(g, estimate) for g in self.geometries for estimate in self.estimates_of(g)]

    @property
    def needs(self) -> Needs:
        """What the estimates need of every geometry, beside what it reads anyway."""
        estimates = {estimate for _, estimate in self.measured}
        nested = "nested" in estimates
        return Needs(signed_sums=nested or "cross_fitted" in estimates, nested_sums=nested)

    @property
    def reads_optimizer(self) -> bool:
        """Whether the optimizer's state, rates or momenta are part of what is measured."""
        return self.of_momentum or any(GEOMETRIES[name].reads_optimizer for name in self.geometries)

    @property
    def fewest_samples(self) -> int:
        """Micro-batches over all ranks that a measured step needs."""
        return fewest_samples(estimate for _, estimate in self.measured)

    def measures_at(self, step: int) -> bool:
        """Whether the noise scale is measured in a step, counted from 1."""
        return bool(self.geometries) and (step == 1 or step % self.every_steps == 0)


def listed(names: Iterable[str]) -> str:
    return f"[{', '.join(names)}]"
