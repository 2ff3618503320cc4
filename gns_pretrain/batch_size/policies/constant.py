"""The batch size stays as it is."""

from dataclasses import dataclass

from gns_pretrain.batch_size.policies.policy import NoiseSource, Position
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale


@dataclass(frozen=True)
class Constant:
    """Never wants anything."""

    source: NoiseSource | None = None

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """No decision, ever."""
        return None
