"""A batch size that grows in proportion to the tokens seen, a baseline."""

from dataclasses import dataclass

from gns_pretrain.batch_size.policies.policy import NoiseSource, Position
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale


@dataclass(frozen=True)
class LinearRamp:
    """From the initial size to the last one over the first tokens of a run.

    Args:
        initial: sequences a step at the beginning.
        size: sequences a step from the ramp's end on.
        tokens: length of the ramp.
    """

    initial: int
    size: int
    tokens: int
    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The size on the line."""
        progress = min(position.tokens / self.tokens, 1.0)
        return self.initial + (self.size - self.initial) * progress
