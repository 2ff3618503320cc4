"""Batch sizes by plan, a stage after the other, a baseline."""

from dataclasses import dataclass

from gns_pretrain.batch_size.policies.policy import NoiseSource, Position
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale


@dataclass(frozen=True)
class Staged:
    """Each stage begins with the first step that starts at or after its tokens.

    Args:
        tokens: thresholds, rising.
        sizes: sequences a step from each threshold on, rising.
    """

    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size of the stage that the run has reached; None before the first threshold."""
        reached = [
            size
            for tokens, size in zip(self.tokens, self.sizes, strict=True)
            if position.tokens >= tokens
        ]
        return reached[-1] if reached else None
