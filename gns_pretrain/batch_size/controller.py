"""From measurements to decisions: averages, rounding, and the learning rate with the batch.

A decision follows from the averages and the position alone, and both are in every checkpoint: one
that was taken between two checkpoints is taken again after a resumption, from the same numbers. A
policy that weighs seconds has those of the steps before a checkpoint there, too; the steps after it
take other seconds when they are taken again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from gns_pretrain.batch_size.feasible import FeasibleSizes, Split
from gns_pretrain.batch_size.policies import LR_EXPONENTS, Policy, PolicySettings, Position
from gns_pretrain.batch_size.settings import check_policies, sizes_for
from gns_pretrain.batch_size.step_times import StepTimes
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_least, checked, setting_name
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.smoothing import (
    NoiseTracker,
    SmoothedNoiseScale,
    SmoothingSettings,
    tracker_of,
)

Count = Annotated[int, at_least(1)]
MaybeCount = Annotated[int | None, at_least(1)]


class Reading(Protocol):
    """What a noise meter reads, as far as a batch size depends on it."""

    @property
    def total(self) -> Measurement:
        """Of the whole model."""


@dataclass(frozen=True)
class Decision:
    """A change of the batch size."""

    policy: str  # name of the controller that took it
    previous: int  # samples of a step before it
    split: Split  # the new size, as ranks take it
    target: float | None  # samples before rounding; None where the ranks alone made it necessary
    lr_multiplier: float  # on the scheduled learning rate, from the new size
    why: str  # how target or ranks became the new size

    def record_fields(self, step: int) -> dict[str, Any]:
        """Return its entries of a line in the record; `step` is the first of the new size."""
        return {
            "step": step,
            "previous": self.previous,
            "new": self.split.batch_size,
            "target": self.target,
            "lr_multiplier": self.lr_multiplier,
            "more": {"why": self.why},
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
            batch_size: B_k, samples.
            noise: averages of what the policy reads; None before the first measurement.
        """
        target = self.policy.target(position, noise)
        if target is None:
            return None
        cap, rounding = self.policy.settings.cap, self.policy.settings.rounding
        limit = min(math.inf if cap is None else cap, position.samples_left)
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
            why = f"limited to cap={cap}: {split}"
        else:
            why = f"limited to what the budget has left: {split}"
        why += self.policy.basis(position)
        return self._decision(batch_size, split, target, why)

    def fit(self, batch_size: int) -> Decision:
        """Split a batch over the ranks at hand; one that they cannot take becomes the next larger.

        That may lie above the cap: a batch never shrinks, and its cap need not be feasible here.
        """
        split, cap = self.sizes.at_least(batch_size), self.policy.settings.cap
        why = f"{batch_size} is not feasible on {self.sizes}: the next larger size, {split}"
        if cap is not None and split.batch_size > cap:
            why += f", above cap={cap}"
        return self._decision(batch_size, split, None, why)

    def _decision(self, previous: int, split: Split, target: float | None, why: str) -> Decision:
        scaling, initial = self.policy.settings.lr_scaling, self.policy.initial_batch_size
        assert scaling is not None
        multiplier = (split.batch_size / initial) ** LR_EXPONENTS[scaling]
        return Decision(self.name, previous, split, target, multiplier, why)


@dataclass(frozen=True)
class SavedState:
    """What `AdaptiveBatchSize.state_dict` returns, as far as it is read again."""

    step: int
    samples: int
    batch_size: int
    lr_multiplier: float
    averages: dict[str, dict[str, float]]
    recent_noise_scales: dict[str, list[float]]
    shadow_batch_sizes: dict[str, int]
    step_seconds: dict[str, list[float]] = field(default_factory=dict)  # not in older ones


class AdaptiveBatchSize:
    """Chooses the batch size of each optimizer step and the learning rate that goes with it.

    In any training loop, beside a noise meter; every rank has one, and all decide alike, because
    all have the same readings:

        adaptive = AdaptiveBatchSize(
            batch_size=64, micro_batch_size=8, num_ranks=world_size, total_samples=1_000_000
        )
        while adaptive.samples < 1_000_000:
            with meter.step(adaptive.steps + 1):
                for _ in range(adaptive.accumulation):  # micro-batches of adaptive.micro_batch_size
                    ...
            readings = meter.read(batch_size=adaptive.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(adaptive.samples) * adaptive.lr_multiplier
            optimizer.step()
            adaptive.step(readings)

    A sample is what a batch size counts: a sequence, an image. The batch never shrinks.

    It owns the averages of what was measured (Eq. 23), the counts of steps and samples, the current
    split and the learning rate's multiplier, the seconds of the last steps where a policy weighs
    them, and `state_dict` has all of them. A policy without
    decays of its own follows the average of its geometry and estimate; another one has an average
    of its own.

    Args:
        settings: the policy that is followed and its settings; None makes them of `options`.
        batch_size: B_0, samples of the first step over all ranks, to which learning-rate multiplier
            and warm-up refer. A run that resumes on other ranks keeps the argument.
        micro_batch_size: samples of one micro-batch on one rank, at first.
        num_ranks: data-parallel ones.
        total_samples: the budget, samples; None where none is known. The warm-up is a share of it,
            and no batch is larger than what it has left.
        tokens_per_sample: for a policy that plans in tokens (staged, linear_ramp); None: no tokens.
        micro_batch_max: the largest micro-batch, to which it grows before steps accumulate more of
            them; None: it keeps its size.
        micro_batch_step: samples by which the micro-batch grows.
        min_samples: micro-batches over all ranks that a step has at least where the batch can
            change, because the noise scale compares them; 8 keep the bias of the paper's estimate
            near 7 %.
        lr_decay: for a policy that follows the schedule (seesaw): samples consumed in, and out the
            share of its peak that the learning rate has decayed to; 1 until the peak.
        shadows: further policies that decide beside it and are not followed; see `decide`.
        smoothing: decays of the averages, the paper's by default.
        options: fields of `PolicySettings`, in place of `settings`: policy ("adaptive" unless
            given), geometry, estimate, target, theta, cap, rounding, lr_scaling,
            decide_every_steps, warmup_fraction and others.

    Raises:
        InputError: an argument that breaks a rule, by its name. That the ranks can take
            `batch_size` is checked at the first use of `split`: a loaded state may have another.
    """

    @checked
    def __init__(
        self,
        settings: PolicySettings | None = None,
        *,
        batch_size: Count,
        micro_batch_size: Count,
        num_ranks: Count = 1,
        total_samples: MaybeCount = None,
        tokens_per_sample: MaybeCount = None,
        micro_batch_max: MaybeCount = None,
        micro_batch_step: Count = 1,
        min_samples: Count = 8,
        lr_decay: Callable[[int], float] | None = None,
        shadows: Sequence[PolicySettings] = (),
        smoothing: SmoothingSettings | None = None,
        **options: Any,
    ) -> None:
        if settings is None:
            settings = PolicySettings(**({"policy": "adaptive"} | options))
        elif options:
            name, value = next(iter(options.items()))
            raise InputError(f"{name}={value} is given beside settings; set it in them")
        policies = [("", settings)]
        policies += [(f"shadows[{number}]", shadow) for number, shadow in enumerate(shadows)]
        check_policies(policies, batch_size, "batch_size")
        total_steps = None if total_samples is None else math.ceil(total_samples / batch_size)
        controllers = []
        for prefix, each in policies:
            policy_name = setting_name(prefix, "policy")
            if each.kind.plans_in_tokens and tokens_per_sample is None:
                raise InputError(
                    f"{policy_name}={each.policy} plans in tokens, and tokens_per_sample is not "
                    "given; give it, or use 1 for a plan in samples"
                )
            if each.kind.follows_schedule and lr_decay is None:
                raise InputError(
                    f"{policy_name}={each.policy} follows the learning rate's schedule, and "
                    "lr_decay is not given; give the function"
                )
            unbounded = each.reads is not None or each.kind.unbounded
            if unbounded and total_samples is None and each.cap is None:
                raise InputError(
                    f"{policy_name}={each.policy} may grow without bound; give "
                    f"{setting_name(prefix, 'cap')} or total_samples"
                )
            policy = each.kind(each, initial_batch_size=batch_size, total_steps=total_steps)
            sizes = sizes_for(
                each,
                num_ranks=num_ranks,
                micro_batch_size=micro_batch_size,
                micro_batch_max=micro_batch_max,
                micro_batch_step=micro_batch_step,
                min_samples=min_samples,
            )
            controllers.append(Controller(each.label, policy, sizes))
        self.followed, *self.shadows = controllers
        self.initial_batch_size = batch_size
        self.total_samples = total_samples
        self.tokens_per_sample = tokens_per_sample or 0
        self._lr_decay = lr_decay or (lambda samples: 1.0)
        self.smoothing = smoothing or SmoothingSettings()
        self.steps = 0  # optimizer steps done
        self.samples = 0  # consumed by them: counted, because the batch changes
        self.lr_multiplier = 1.0  # from the batch size, on top of a schedule
        self._times = StepTimes()  # of steps, where a policy weighs them
        self._split: Split | None = None  # of the coming step; None until it is asked for
        self._shadow_sizes: dict[str, int] = {}  # samples, of the shadows that have decided
        # By geometry/estimate what is measured; by geometry/estimate/policy a policy's own.
        self.averages: dict[str, NoiseTracker] = {}
        self._read: dict[str, NoiseTracker] = {}  # by policy
        for controller in controllers:
            policy = controller.policy
            if (source := policy.reads(policy.settings)) is not None:
                own = policy.own_smoothing(self.smoothing)
                key = "/".join(source if own is None else (*source, controller.name))
                tracker = tracker_of(*source, own or self.smoothing)
                self._read[controller.name] = self.averages.setdefault(key, tracker)

    @property
    def split(self) -> Split:
        """The coming step over ranks; InputError where they cannot take the first batch size."""
        if self._split is None:
            self._split = self.followed.sizes.require(self.initial_batch_size, "batch_size")
        return self._split

    @property
    def batch_size(self) -> int:
        """Samples of the coming step, over all ranks."""
        return self.split.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of each micro-batch of the coming step."""
        return self.split.micro_batch_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in the coming step."""
        return self.split.accumulation

    @property
    def tokens(self) -> int:
        """Tokens of all samples so far; 0 without `tokens_per_sample`."""
        return self.samples * self.tokens_per_sample

    @property
    def position(self) -> Position:
        """Before the coming step."""
        total = math.inf if self.total_samples is None else self.total_samples
        return Position(
            self.steps + 1,
            self.samples,
            self.tokens,
            total - self.samples,
            lr_decay=self._lr_decay(self.samples),
            step_time=self._times.fitted if self.weighs_seconds else None,
        )

    @property
    def weighs_seconds(self) -> bool:
        """Whether a policy weighs the seconds of steps, so that each step's must be included."""
        return any(each.policy.weighs_seconds for each in (self.followed, *self.shadows))

    @property
    def seconds_due(self) -> bool:
        """Whether `decide` is about to weigh them: all steps' seconds are to be included now."""
        return any(
            each.policy.weighs_seconds
            and (self.steps + 1) % each.policy.settings.decide_every_steps == 0
            for each in (self.followed, *self.shadows)
        )

    def step(
        self, readings: Iterable[Reading] = (), *, seconds: float | None = None
    ) -> Decision | None:
        """Count an optimizer step, average what was read in it, and decide on the coming one.

        Args:
            readings: of the noise meter; none after a step without a measurement.
            seconds: that the step took, for the policy goodput; the same on every rank, such as the
                longest.

        Returns:
            The change of the batch size, None where it stays. It has been made: `batch_size`,
            `accumulation` and `lr_multiplier` are those of the coming step.

        Raises:
            InputError: there are readings, and none of the geometry and estimate that is followed;
                or a policy weighs seconds, and none are given.
        """
        if self.weighs_seconds:
            if seconds is None:
                names = [each.name for each in (self.followed, *self.shadows)]
                raise InputError(
                    f"a policy of {', '.join(names)} weighs the seconds of a step, and none are "
                    "given; give step(readings, seconds=...), the same on every rank"
                )
            self.include_seconds(self.batch_size, seconds)
        measurements = [reading.total for reading in readings]
        found = {f"{m.geometry}/{m.estimate}" for m in measurements}
        followed = self._read.get(self.followed.name)
        if found and followed and f"{followed.geometry}/{followed.estimate}" not in found:
            raise InputError(
                f"policy {self.followed.name} follows the noise scale {followed.geometry}/"
                f"{followed.estimate}, and the readings have {', '.join(sorted(found))}; give the "
                "meter and AdaptiveBatchSize one geometry and estimate"
            )
        self.observe(measurements)
        decision, _ = self.decide()
        return decision

    def include_seconds(self, batch_size: int, seconds: float) -> None:
        """Remember how long a step took; the same seconds on every rank, so that all decide alike.

        `step` does it; a loop with `observe` and `decide` has to before it decides (`seconds_due`).
        """
        self._times.include(batch_size, seconds)

    def observe(self, measurements: Iterable[Measurement] = ()) -> None:
        """Count an optimizer step, and average what was measured in it (Eq. 23).

        This and `decide` are the halves of `step`, for a loop that saves its state between them.
        A measurement that is not finite is left out.
        """
        self.samples += self.batch_size
        self.steps += 1
        for measurement in measurements:
            self._tracker(measurement.geometry, measurement.estimate)
            for tracker in self.averages.values():
                tracker.include(measurement)

    def decide(self) -> tuple[Decision | None, list[Decision]]:
        """Decide on the coming step, and make the change.

        Returns:
            The change, None where the batch stays; and those that shadows would have made.
        """
        position = self.position
        noise = self.noise_for(self.followed)
        decision = self.followed.decide(position, self.batch_size, noise)
        if decision:
            self._split, self.lr_multiplier = decision.split, decision.lr_multiplier
        of_shadows = []
        for shadow in self.shadows:
            previous = self._shadow_sizes.get(shadow.name, self.initial_batch_size)
            if change := shadow.decide(position, previous, self.noise_for(shadow)):
                self._shadow_sizes[shadow.name] = change.split.batch_size
                of_shadows.append(change)
        return decision, of_shadows

    def noise_for(self, controller: Controller) -> SmoothedNoiseScale | None:
        """Return the averages that a policy follows; None before its first measurement."""
        tracker = self._read.get(controller.name)
        return tracker.smoothed if tracker else None

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, fit for JSON and the same on every rank."""
        trackers = {key: tracker.state_dict() for key, tracker in self.averages.items()}
        # These keys are part of checkpoints.
        return {
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
            "step": self.steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "lr_multiplier": self.lr_multiplier,
            "averages": {key: tracker["averages"] for key, tracker in trackers.items()},
            "recent_noise_scales": {key: tracker["recent"] for key, tracker in trackers.items()},
            "shadow_batch_sizes": dict(self._shadow_sizes),
            "step_seconds": self._times.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Decision | None:
        """Load what `state_dict` returned, on this or another number of ranks.

        Returns:
            The change, where these ranks cannot take the saved batch size: the next larger one with
            its learning rate. None where they can, perhaps in other micro-batches.
        """
        self.steps, self.samples = state["step"], state["samples"]
        for key, averages in state["averages"].items():
            # Older checkpoints also hold a copy of the average for every policy that follows it.
            if key.count("/") == 1:
                self._tracker(*key.split("/"))
            if key in self.averages:
                recent = state["recent_noise_scales"].get(key, [])
                self.averages[key].load_state_dict({"averages": averages, "recent": recent})
        self._shadow_sizes = dict(state["shadow_batch_sizes"])
        if times := state.get("step_seconds"):  # older checkpoints have none
            ranks = self.followed.sizes.num_ranks
            if ranks * state["micro_batch_size"] * state["accumulation"] == state["batch_size"]:
                self._times.load_state_dict(times)  # other ranks take others
        fitted = self.followed.fit(state["batch_size"])
        self._split, self.lr_multiplier = fitted.split, state["lr_multiplier"]
        if fitted.split.batch_size == state["batch_size"]:
            return None
        self.lr_multiplier = fitted.lr_multiplier
        return fitted

    def _tracker(self, geometry: str, estimate: str) -> NoiseTracker:
        """Return the average of one geometry and estimate, begun where it is new."""
        begun = tracker_of(geometry, estimate, self.smoothing)
        return self.averages.setdefault(f"{geometry}/{estimate}", begun)
