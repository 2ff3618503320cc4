"""From measurements to decisions: a policy's averages, the rounding and the learning rate with it.

A controller holds nothing that changes: batch size and averages come from the run's state and go
back to it. A decision between two checkpoints is therefore taken again after a resumption, from the
same numbers.
"""

import math
from dataclasses import asdict, dataclass

from gns_pretrain.batch_size.feasible import FeasibleSizes, Split
from gns_pretrain.batch_size.policies import Policy, Position, make_policy
from gns_pretrain.batch_size.settings import PolicySettings
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import (
    Averages,
    SmoothedNoiseScale,
    SmoothingSettings,
    include,
    smoothed,
)

SavedAverages = dict[str, dict[str, float]]  # by geometry/estimate/policy, as checkpoints hold them


@dataclass(frozen=True)
class Decision:
    """A change of the batch size.

    Args:
        split: the new size, as ranks take it.
        target: what the policy wanted before rounding, in sequences.
        lr_multiplier: on the scheduled learning rate, from the new size.
        why: how the one became the other, for people.
    """

    split: Split
    target: float
    lr_multiplier: float
    why: str


@dataclass(frozen=True)
class Controller:
    """One policy of a run, whether it is followed or only logged.

    Args:
        name: distinguishes its averages and its lines in the record.
        policy: wants batch sizes.
        sizes: those that the ranks can take.
        initial_batch_size: B_0, where the learning rate's multiplier is 1.
        rounding: "down" or "up".
        cap: sequences that no decision exceeds; None for no cap.
        lr_scaling: see `lr_multiplier`.
    """

    name: str
    policy: Policy
    sizes: FeasibleSizes
    initial_batch_size: int
    rounding: str
    cap: int | None
    lr_scaling: str

    def include(self, averages: SavedAverages, measurement: Measurement) -> None:
        """Add a measurement to this policy's own averages, if it is one that the policy reads.

        A measurement that is not finite changes nothing.
        """
        source = self.policy.source
        if source and (source.geometry, source.estimate) == (
            measurement.geometry,
            measurement.estimate,
        ):
            before = Averages(**averages.get(self._key, {}))
            if (after := include(before, measurement, source.smoothing)) != before:
                averages[self._key] = asdict(after)

    def wanted(self, position: Position, averages: SavedAverages) -> float | None:
        """The policy's target for the coming step, in sequences; None where it decides nothing."""
        return self.policy.target(position, self._noise(averages))

    def decide(
        self, position: Position, batch_size: int, averages: SavedAverages
    ) -> Decision | None:
        """The batch size of the coming step, if it is to change.

            B_(k+1) = max(B_k, rounded(target))   (Algorithm 1, line 9)

        The cap, and what the budget has left, bound the target: a noise scale may grow without
        bound as its signal vanishes.

        Args:
            position: of the run, before the step.
            batch_size: B_k, sequences.
            averages: of all policies; only this one's are read.
        """
        target = self.wanted(position, averages)
        if target is None:
            return None
        limit = min(math.inf if self.cap is None else self.cap, position.sequences_left)
        split = self.sizes.at_most(min(target, limit))
        if self.rounding == "up" and target <= limit:
            above = self.sizes.at_least(target)
            split = above if above.batch_size <= limit else self.sizes.at_most(limit)
        if split is None or split.batch_size <= batch_size:
            return None
        multiplier = lr_multiplier(self.lr_scaling, split.batch_size, self.initial_batch_size)
        return Decision(split, target, multiplier, self._why(target, limit, split))

    def _why(self, target: float, limit: float, split: Split) -> str:
        """How a target became a size."""
        if target == split.batch_size:
            return str(split)
        if target <= limit and (split.batch_size > target) == (self.rounding == "up"):
            return f"rounded {self.rounding} to {split}"
        if limit == self.cap:
            return f"held to batch_size.cap={self.cap}: {split}"
        return f"held to what the budget has left: {split}"

    def _noise(self, averages: SavedAverages) -> SmoothedNoiseScale | None:
        """What the policy's averages say; None before the first measurement."""
        source = self.policy.source
        if source is None or self._key not in averages:
            return None
        return smoothed(Averages(**averages[self._key]), source.estimate, source.smoothing)

    @property
    def _key(self) -> str:
        source = self.policy.source
        assert source is not None
        return f"{source.geometry}/{source.estimate}/{self.name}"


def lr_multiplier(scaling: str, batch_size: int, initial_batch_size: int) -> float:
    """Factor on the scheduled learning rate (Algorithm 1, line 10): from the realised batch size.

    sqrt: (B / B_0)^(1/2), the paper's    linear: B / B_0    none: 1
    """
    exponent = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[scaling]
    return float((batch_size / initial_batch_size) ** exponent)


def make_controller(
    settings: PolicySettings,
    name: str,
    *,
    sizes: FeasibleSizes,
    initial_batch_size: int,
    total_steps: int,
    smoothing: SmoothingSettings,
) -> Controller:
    """The controller of one policy.

    Args:
        settings: checked.
        name: distinguishes it from the run's other policies.
        sizes: that the ranks can take.
        initial_batch_size: B_0, sequences.
        total_steps: S, steps that the token budget takes at B_0.
        smoothing: of the noise scale, where the policy has no decays of its own.
    """
    assert settings.rounding is not None
    assert settings.lr_scaling is not None
    return Controller(
        name=name,
        policy=make_policy(
            settings,
            initial_batch_size=initial_batch_size,
            total_steps=total_steps,
            smoothing=smoothing,
        ),
        sizes=sizes,
        initial_batch_size=initial_batch_size,
        rounding=settings.rounding,
        cap=settings.cap,
        lr_scaling=settings.lr_scaling,
    )
