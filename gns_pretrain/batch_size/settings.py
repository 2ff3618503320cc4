"""Settings of the batch size: the policy that is followed, and those that are only logged."""

from dataclasses import dataclass, field
from typing import Annotated

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policies import POLICIES, PolicySettings
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_least, key_of


@dataclass
class ShadowSettings(PolicySettings):
    """A policy that is only logged: what it would have chosen."""

    policy: Annotated[str, key_of(POLICIES)] = "adaptive"
    name: str | None = None  # in the record; null: made of policy, geometry, estimate and target

    @property
    def label(self) -> str:
        """The name of its averages and of its lines: `adaptive_manhattan_plug_in_theta_0.6`."""
        if self.name is not None:
            return self.name
        words = [self.policy, *(getattr(self, name) for name in self.kind.named_by)]
        if words[-1] in ("theta", "kappa"):
            words.append(getattr(self, words[-1]))
        return "_".join(map(str, words))


@dataclass
class BatchSizeSettings(PolicySettings):
    """How many sequences an optimizer step takes, at first and later."""

    # sequences, over all ranks
    initial: Annotated[
        int, at_least(1, "sequence", hint="it counts one optimizer step over all ranks")
    ] = 16
    # largest micro-batch; null: micro_batch_size, always
    micro_batch_max: Annotated[int | None, at_least(1, "sequence")] = None
    # sequences by which the micro-batch grows to its largest
    micro_batch_step: Annotated[int, at_least(1, "sequence")] = 1
    shadows: list[ShadowSettings] = field(default_factory=list)  # logged, never followed

    def __post_init__(self) -> None:
        """Check the policy and its shadows, and that their sizes and names fit one another."""
        super().__post_init__()
        for prefix, policy in self.policies:
            policy.check(prefix)
            for name, size in policy.whole_sizes:
                if size < self.initial:
                    hint = "raise the cap, or use null for none" if name == "cap" else "raise it"
                    raise InputError(
                        f"{prefix}.{name}={size} is below batch_size.initial={self.initial}; a "
                        f"batch never shrinks: {hint}"
                    )
        labels = [policy.label for _, policy in self.policies]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(
                    f"batch_size has the policy {label} more than once; give a shadow another "
                    "name, as in {policy: adaptive, theta: 0.5, name: patient}"
                )

    @property
    def policies(self) -> list[tuple[str, PolicySettings]]:
        """The policy that is followed, then the shadows, each after the prefix of its settings."""
        shadows = enumerate(self.shadows)
        return [
            ("batch_size", self),
            *((f"batch_size.shadows[{number}]", shadow) for number, shadow in shadows),
        ]

    def sizes_for(
        self, policy: PolicySettings, *, num_ranks: int, micro_batch_size: int, min_samples: int
    ) -> FeasibleSizes:
        """Return the batch sizes that ranks can take under a policy, this one or a shadow.

        A constant batch has constant micro-batches, and needs no samples.

        Raises:
            InputError: the largest micro-batch is below the smallest.
        """
        if not policy.kind.changes:
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
