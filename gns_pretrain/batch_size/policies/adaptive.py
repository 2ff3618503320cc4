"""The adaptive batch size (arXiv:2602.03001, Algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass

from gns_pretrain.batch_size.policies.policy import NoiseSource, Position
from gns_pretrain.noise_scale.smoothing import SmoothedNoiseScale


@dataclass(frozen=True)
class Adaptive:
    """The batch size follows the smoothed noise scale, once the warm-up is over.

    A decision is taken before every step that `every_steps` divides, on the measurements so far.
    With every_steps=10 and a measurement every F = 100 steps this is what the published runs did,
    to the last token: the measurement of step 3900 changes the batch of step 3910. With
    every_steps=1 it changes that of the very next step, as Algorithm 1 is printed.

    Args:
        source: the noise scale it reads.
        wanted: the batch size that a noise scale asks for; None where it has no signal.
        every_steps: decision interval.
        warmup_samples: I, sequences that must have been consumed before a change.
    """

    source: NoiseSource
    wanted: Callable[[SmoothedNoiseScale], float | None]
    every_steps: int
    warmup_samples: int

    def target(self, position: Position, noise: SmoothedNoiseScale | None) -> float | None:
        """What the noise scale asks for (Eq. 7, or a target of Appendix B)."""
        if noise is None or position.step % self.every_steps:
            return None
        return None if position.samples < self.warmup_samples else self.wanted(noise)
