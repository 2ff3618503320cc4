"""Seconds of an optimizer step by its batch size, as the run itself takes them.

    t(B) = a + b B    a, the fixed part, in seconds; b in seconds a sample

Each size has the median over its last steps, which an outlier (a compilation, a busy minute) does
not move; a and b are a least-squares line through the medians. While one size alone has been timed,
no line is known, and half of its step counts as fixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression, median

KEPT = 64  # steps of each size, the newest
NEEDED = 8  # steps of a size before its median counts
FIXED_SHARE = 0.5  # of a step, while one size alone has been timed


@dataclass(frozen=True)
class StepTime:
    """The line t(B), and what it was drawn through."""

    fixed: float  # a, seconds
    per_sample: float  # b, seconds
    sizes: tuple[int, ...]  # batch sizes that were timed, ascending

    @property
    def overhead(self) -> float:
        """a / b, samples; inf where a sample takes no time of its own."""
        return self.fixed / self.per_sample if self.per_sample > 0.0 else float("inf")

    def __str__(self) -> str:
        line = f"a step takes {self.fixed:.3g} s and {self.per_sample:.3g} s a sample"
        if len(self.sizes) > 1:
            return f"{line}, by {len(self.sizes)} batch sizes"
        return f"{line}, {FIXED_SHARE:.0%} fixed by assumption: only {self.sizes[0]} was timed yet"


class StepTimes:
    """Owns the seconds of a run's last steps."""

    def __init__(self) -> None:
        self._seconds: dict[int, list[float]] = {}  # by batch size, newest last

    def include(self, batch_size: int, seconds: float) -> None:
        """Add a step; on all ranks the same seconds."""
        self._seconds[batch_size] = [*self._seconds.get(batch_size, []), seconds][-KEPT:]

    @property
    def fitted(self) -> StepTime | None:
        """The line; None until the largest size has been timed often enough."""
        medians = {
            size: median(seconds)
            for size, seconds in sorted(self._seconds.items())
            if len(seconds) >= NEEDED
        }
        if not medians or max(self._seconds) not in medians:
            return None
        sizes, seconds = tuple(medians), list(medians.values())
        if len(sizes) == 1:
            fixed = FIXED_SHARE * seconds[0]
            return StepTime(fixed, (seconds[0] - fixed) / sizes[0], sizes)
        per_sample, fixed = linear_regression(sizes, seconds)
        if per_sample <= 0.0:
            return StepTime(fmean(seconds), 0.0, sizes)
        if fixed < 0.0:
            return StepTime(0.0, linear_regression(sizes, seconds, proportional=True).slope, sizes)
        return StepTime(fixed, per_sample, sizes)

    def state_dict(self) -> dict[str, list[float]]:
        """All seconds, fit for JSON."""
        return {str(size): list(seconds) for size, seconds in self._seconds.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Inverse of `state_dict`."""
        self._seconds = {int(size): list(seconds) for size, seconds in state.items()}
