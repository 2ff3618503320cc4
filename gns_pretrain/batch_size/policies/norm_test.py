"""The norm test of AdAdaGrad (arXiv:2402.11215), a baseline."""

from dataclasses import dataclass

from gns_pretrain.batch_size.policies.policy import NoiseSource, Position
from gns_pretrain.noise_scale.critical_batch import target_batch_size
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale, SmoothingSettings

# The test looks at one step's gradients: nothing is averaged.
LAST_MEASUREMENT = NoiseSource(
    "euclidean", "plug_in", SmoothingSettings(noise_decay=0.0, signal_decay=0.0)
)


@dataclass(frozen=True)
class NormTest:
    """The batch grows when its gradient's variance is too large for its gradient's norm.

        passed: tr C / B <= eta^2 ||g||_2^2        failed: B = tr C / (eta^2 ||g||_2^2)

    The size after a failed test is Eq. 7 of the Euclidean noise scale, from the last measurement
    alone and without a warm-up.

    Args:
        eta: tolerated noise-to-signal ratio of the gradient.
        every_steps: a test before every step that this divides.
    """

    eta: float
    every_steps: int
    source: NoiseSource = LAST_MEASUREMENT

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """The smallest batch that would have passed the test."""
        if noise is None or position.step % self.every_steps:
            return None
        return target_batch_size(noise.noise, noise.signal, theta=self.eta)
