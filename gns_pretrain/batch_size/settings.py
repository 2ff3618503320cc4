"""Settings of the batch size: the policy that is followed, and those that are only logged."""

from dataclasses import dataclass, field

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policy_settings import PolicySettings
from gns_pretrain.errors import InputError


@dataclass
class ShadowSettings(PolicySettings):
    """A policy that only says what it would have chosen."""

    policy: str = "adaptive"
    name: str | None = None  # in the record; null: made of policy, geometry, estimate and target

    @property
    def label(self) -> str:
        """The name it goes by."""
        if self.name is not None:
            return self.name
        if self.policy == "adaptive":
            value = {"theta": f"_{self.theta}", "kappa": f"_{self.kappa}"}.get(self.target, "")
            return f"adaptive_{self.geometry}_{self.estimate}_{self.target}{value}"
        return f"norm_test_{self.theta}" if self.policy == "norm_test" else self.policy


@dataclass
class BatchSizeSettings(PolicySettings):
    """How many sequences an optimizer step takes, at first and later."""

    initial: int = 16  # sequences, over all ranks
    micro_batch_max: int | None = None  # largest micro-batch; null: micro_batch_size, always
    micro_batch_step: int = 1  # sequences by which the micro-batch grows to its largest
    shadows: list[ShadowSettings] = field(default_factory=list)  # logged, never followed

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        super().__post_init__()
        self.check("batch_size")
        if self.initial < 1:
            raise InputError(
                f"batch_size.initial={self.initial} must be at least 1 sequence; "
                "it counts the sequences of one optimizer step over all ranks"
            )
        for name in ("micro_batch_max", "micro_batch_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"batch_size.{name}={value} must be at least 1 sequence")
        policies: list[tuple[str, PolicySettings]] = [("batch_size", self)]
        for number, shadow in enumerate(self.shadows):
            policies.append((f"batch_size.shadows[{number}]", shadow))
            shadow.check(policies[-1][0])
        for prefix, policy in policies:
            for name, size in policy.whole_sizes:
                if size < self.initial:
                    way_out = "raise the cap, or use null for none" if name == "cap" else "raise it"
                    raise InputError(
                        f"{prefix}.{name}={size} is below batch_size.initial={self.initial}; a "
                        f"batch never shrinks: {way_out}"
                    )
        labels = [self.policy, *(shadow.label for shadow in self.shadows)]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(
                    f"batch_size has the policy {label} more than once; give a shadow another "
                    "name, as in {policy: adaptive, theta: 0.5, name: patient}"
                )

    def sizes_for(
        self, policy: PolicySettings, *, num_ranks: int, micro_batch_size: int, min_samples: int
    ) -> FeasibleSizes:
        """The batch sizes that ranks can take under a policy.

        Args:
            policy: this one or a shadow; a constant batch has constant micro-batches, and needs no
                samples.
            num_ranks: data-parallel ranks.
            micro_batch_size: sequences of the smallest micro-batch.
            min_samples: micro-batches of a step at least, where the batch may change.

        Raises:
            InputError: the largest micro-batch is below the smallest.
        """
        if policy.policy == "constant":
            return FeasibleSizes(num_ranks, micro_batch_size, micro_batch_size)
        if self.micro_batch_max is not None and self.micro_batch_max < micro_batch_size:
            raise InputError(
                f"batch_size.micro_batch_max={self.micro_batch_max} is below micro_batch_size="
                f"{micro_batch_size}, from which it grows; raise it, or use null to hold the shape"
            )
        return FeasibleSizes(
            num_ranks=num_ranks,
            micro_batch_size=micro_batch_size,
            micro_batch_max=self.micro_batch_max or micro_batch_size,
            micro_batch_step=self.micro_batch_step,
            min_samples=min_samples,
        )
