"""Steps whose update would harm: left out, counted, and limited.

A step is bad if its loss or gradient norm is not finite, or if the norm is far above those of the
last good steps. Its sequences count as consumed, its gradient is dropped, and weights and optimizer
state stay as they are.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from gns_pretrain.errors import DivergedError, InputError
from gns_pretrain.fields import Settings, at_least
from gns_pretrain.parallel.collectives import sum_over_ranks
from gns_pretrain.parallel.mesh import World


@dataclass
class BadStepSettings(Settings):
    """Whether a bad step is left out; without, one that is not finite ends the run."""

    section: ClassVar[str] = "bad_steps"

    skip: bool = False  # the host then waits for the gradient norm in every step
    # bad above this many times the median gradient norm of the last good steps; null: no such rule
    norm_factor: Annotated[float | None, at_least(1.0)] = None
    window: Annotated[int, at_least(2, "step")] = 128  # good steps that the median is of
    max_consecutive: Annotated[int, at_least(1, "step")] = 10  # one more ends the run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_factor is not None and not self.skip:
            raise InputError(
                f"bad_steps.norm_factor={self.norm_factor} is read by bad_steps.skip=true alone; "
                "set both, or neither"
            )


class BadSteps:
    """Tells bad steps from good ones, alike on every rank."""

    def __init__(self, settings: BadStepSettings, world: World) -> None:
        self.settings = settings
        self._world = world
        self._norms: deque[float] = deque(maxlen=settings.window)  # of the last good steps
        self.consecutive = 0  # bad steps since the last good one

    def reason(self, loss: Tensor, gradient_norm: Tensor) -> str | None:
        """Count a step; all ranks together, before the update.

        Args:
            loss: 0-dim, of this rank.
            gradient_norm: 0-dim, of all ranks, before clipping.

        Returns:
            Why it is bad; None if it is good.
        """
        # Summed, the norm too: a rank that saw another last bit must not decide otherwise.
        both = sum_over_ranks(torch.stack([loss, gradient_norm]), self._world)
        mean_loss, norm = (both / self._world.num_ranks).tolist()
        why = self._why(mean_loss, norm)
        if why is None:
            self._norms.append(norm)
            self.consecutive = 0
        else:
            self.consecutive += 1
        return why

    def _why(self, loss: float, norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not isfinite(value):
                return f"the {name} is {value}, not finite"
        factor = self.settings.norm_factor
        # Half a window, because the norms of a run's first steps say little about the next ones.
        if factor is not None and 2 * len(self._norms) >= self.settings.window:
            usual = median(self._norms)
            if norm > factor * usual:
                return (
                    f"the gradient norm {norm:.3g} is above bad_steps.norm_factor={factor:g} times "
                    f"the usual {usual:.3g}"
                )
        return None

    def raise_beyond_limit(self, step: int, why: str) -> None:
        """Raise DivergedError if more steps in a row were bad than may be."""
        if self.consecutive > self.settings.max_consecutive:
            raise DivergedError(
                f"step {step}: {why}, as in {self.settings.max_consecutive} steps before it, all "
                "that bad_steps.max_consecutive skips; look at the data",
                on_all_ranks=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON and the same on every rank."""
        return {"norms": list(self._norms), "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._norms.extend(state["norms"])
        self.consecutive = state["consecutive"]
