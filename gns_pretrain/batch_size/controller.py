"""From measurements to decisions: averages, rounding, and the learning rate with the batch.

A decision follows from the averages and the position alone, and both are in every checkpoint: one
that was taken between two checkpoints is taken again after a resumption, from the same numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gns_pretrain.batch_size.feasible import FeasibleSizes, Split
from gns_pretrain.batch_size.policies import LR_EXPONENTS, Policy, Position
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import NoiseTracker, SmoothedNoiseScale, SmoothingSettings


@dataclass(frozen=True)
class Decision:
    """A change of the batch size."""

    policy: str  # name of the controller that took it
    previous: int  # sequences of a step before it
    split: Split  # the new size, as ranks take it
    target: float | None  # sequences before rounding; None where the ranks alone made it necessary
    lr_multiplier: float  # on the scheduled learning rate, from the new size
    why: str  # how target or ranks became the new size, for the log

    def record_fields(self, step: int) -> dict[str, Any]:
        """Return its entries of a line in the record; `step` is the first of the new size."""
        return {
            "step": step,
            "previous": self.previous,
            "new": self.split.batch_size,
            "target": self.target,
            "lr_multiplier": self.lr_multiplier,
        }


@dataclass(frozen=True)
class Controller:
    """One policy of a run, whether it is followed or only logged."""

    name: str  # of its averages, if it has its own, and of its lines in the record
    policy: Policy
    sizes: FeasibleSizes  # that the ranks can take

    def decide(
        self, position: Position, batch_size: int, noise: SmoothedNoiseScale | None
    ) -> Decision | None:
        """Return the batch size of the coming step, if it is to change.

            B_(k+1) = max(B_k, rounded(target))   (Algorithm 1, line 9)

        The cap, and what the budget has left, bound the target: a noise scale may grow without
        bound as its signal vanishes.

        Args:
            batch_size: B_k, sequences.
            noise: averages of what the policy reads; None before the first measurement.
        """
        target = self.policy.target(position, noise)
        if target is None:
            return None
        cap, rounding = self.policy.settings.cap, self.policy.settings.rounding
        limit = min(math.inf if cap is None else cap, position.sequences_left)
        split = self.sizes.at_most(min(target, limit))
        if rounding == "up" and target <= limit:
            above = self.sizes.at_least(target)
            split = above if above.batch_size <= limit else self.sizes.at_most(limit)
        if split is None or split.batch_size <= batch_size:
            return None
        if target == split.batch_size:
            why = str(split)
        elif target <= limit and (split.batch_size > target) == (rounding == "up"):
            why = f"rounded {rounding} to {split}"
        elif limit == cap:
            why = f"limited to batch_size.cap={cap}: {split}"
        else:
            why = f"limited to what the budget has left: {split}"
        return self._decision(batch_size, split, target, why)

    def fit(self, batch_size: int) -> Decision:
        """Split a batch over the ranks at hand; one that they cannot take becomes the next larger.

        That may lie above the cap: a batch never shrinks, and its cap need not be feasible here.
        """
        split, cap = self.sizes.at_least(batch_size), self.policy.settings.cap
        why = f"{batch_size} is not feasible on {self.sizes}: the next larger size, {split}"
        if cap is not None and split.batch_size > cap:
            why += f", above batch_size.cap={cap}"
        return self._decision(batch_size, split, None, why)

    def _decision(self, previous: int, split: Split, target: float | None, why: str) -> Decision:
        scaling, initial = self.policy.settings.lr_scaling, self.policy.initial_batch_size
        assert scaling is not None
        multiplier = (split.batch_size / initial) ** LR_EXPONENTS[scaling]
        return Decision(self.name, previous, split, target, multiplier, why)


class BatchSizer:
    """Follows one policy, lets shadows decide beside it, and owns the averages that all read.

    A policy without decays of its own follows the average of its geometry and estimate that is
    logged; another one has an average of its own.

    Args:
        controllers: the one that is followed, then the shadows.
        measured: geometry and estimate of each measurement; the policies' are added.
    """

    def __init__(
        self,
        controllers: Sequence[Controller],
        smoothing: SmoothingSettings,
        *,
        measured: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.followed, *self.shadows = controllers
        self._shadow_sizes: dict[str, int] = {}  # sequences, of the shadows that have decided
        # By geometry/estimate what is logged; by geometry/estimate/policy a policy's own.
        self.averages = {f"{g}/{e}": NoiseTracker(g, e, smoothing) for g, e in measured}
        self._read: dict[str, NoiseTracker] = {}  # by policy
        for controller in controllers:
            policy = controller.policy
            if (source := policy.reads(policy.settings)) is not None:
                own = policy.own_smoothing(smoothing)
                key = "/".join(source if own is None else (*source, controller.name))
                tracker = NoiseTracker(*source, own or smoothing)
                self._read[controller.name] = self.averages.setdefault(key, tracker)

    def noise_for(self, controller: Controller) -> SmoothedNoiseScale | None:
        """Return the averages that a policy follows; None before its first measurement."""
        tracker = self._read.get(controller.name)
        return tracker.smoothed if tracker else None

    def decide(self, position: Position, batch_size: int) -> tuple[Decision | None, list[Decision]]:
        """Return what the run is to do, None to stay as it is; and what shadows would have done.

        Args:
            position: of the run, before the step.
            batch_size: sequences of the step before.
        """
        decision = self.followed.decide(position, batch_size, self.noise_for(self.followed))
        of_shadows = []
        for shadow in self.shadows:
            previous = self._shadow_sizes.get(shadow.name, shadow.policy.initial_batch_size)
            if change := shadow.decide(position, previous, self.noise_for(shadow)):
                self._shadow_sizes[shadow.name] = change.split.batch_size
                of_shadows.append(change)
        return decision, of_shadows

    def observe(self, measurements: Iterable[Measurement]) -> None:
        """Add the measurements of a step to the averages of their geometry and estimate."""
        for measurement in measurements:
            for tracker in self.averages.values():
                tracker.include(measurement)

    def state_dict(self) -> dict[str, Any]:
        """Averages, the noise scales behind their spread, and the shadows' sizes."""
        states = {key: tracker.state_dict() for key, tracker in self.averages.items()}
        return {
            "averages": {key: state["averages"] for key, state in states.items()},
            "recent_noise_scales": {key: state["recent"] for key, state in states.items()},
            "shadow_batch_sizes": dict(self._shadow_sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; averages that no policy of the run follows are ignored.

        Older checkpoints also hold a copy of the logged average for every policy that follows it.
        """
        for key, tracker in self.averages.items():
            if key in state["averages"]:
                recent = state["recent_noise_scales"].get(key, [])
                tracker.load_state_dict({"averages": state["averages"][key], "recent": recent})
        self._shadow_sizes = dict(state["shadow_batch_sizes"])
