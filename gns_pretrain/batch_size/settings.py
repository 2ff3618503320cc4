"""Settings of the batch size: the policy that is followed, and those that are only logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.batch_size.policies import POLICIES, PolicySettings
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_least, key_of, setting_name


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

    # sequences, over all ranks; auto: by the law of arXiv:2505.13738, from token_budget
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
        check_policies(self.policies, self.initial, "batch_size.initial")

    @property
    def policies(self) -> list[tuple[str, PolicySettings]]:
        """The policy that is followed, then the shadows, each after the prefix of its settings."""
        shadows = enumerate(self.shadows)
        return [
            ("batch_size", self),
            *((f"batch_size.shadows[{number}]", shadow) for number, shadow in shadows),
        ]


def sizes_for(
    policy: PolicySettings,
    *,
    num_ranks: int,
    micro_batch_size: int,
    micro_batch_max: int | None,
    micro_batch_step: int,
    min_samples: int,
    names: Mapping[str, str] | None = None,
) -> FeasibleSizes:
    """Return the batch sizes that ranks can take under a policy.

    A batch that never changes has constant micro-batches, and needs no samples. The arguments are
    the fields of `FeasibleSizes`; micro_batch_max None holds the micro-batch.

    Raises:
        InputError: the largest micro-batch is below the smallest.
    """
    if not policy.kind.changes:
        return FeasibleSizes(num_ranks, micro_batch_size, micro_batch_size)
    return FeasibleSizes(
        num_ranks=num_ranks,
        micro_batch_size=micro_batch_size,
        micro_batch_max=micro_batch_max or micro_batch_size,
        micro_batch_step=micro_batch_step,
        min_samples=min_samples,
        names=names or {},
    )


def check_policies(
    policies: Sequence[tuple[str, PolicySettings]], initial: int, initial_name: str
) -> None:
    """Check the policies of a run, and that their sizes and labels fit one another.

    Args:
        policies: each after the prefix of its settings, as the user writes them.
        initial: the first batch size, which the user calls `initial_name`.

    Raises:
        InputError: the first rule that is broken.
    """
    for prefix, policy in policies:
        policy.check(prefix)
        for name, size in policy.whole_sizes:
            if size < initial:
                hint = "raise the cap, or use null for none" if name == "cap" else "raise it"
                raise InputError(
                    f"{setting_name(prefix, name)}={size} is below {initial_name}={initial}; a "
                    f"batch never shrinks: {hint}"
                )
    labels = [policy.label for _, policy in policies]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"there is the policy {label} more than once; give a shadow another name, as in "
                "{policy: adaptive, theta: 0.5, name: patient}"
            )
