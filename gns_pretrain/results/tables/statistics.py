"""The arithmetic of the tables (arXiv:2602.03001, Tables 2, 3, 8 and 9). Pure functions.

A loss is in nats per token. Steps are optimizer steps. Runs that are compared have the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev


@dataclass(frozen=True)
class LossCurve:
    """Evaluations of a run.

    Args:
        steps: after which it was evaluated, ascending; at least one.
        losses: validation losses there.
        total_steps: of the whole run.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    total_steps: int

    @property
    def minimum(self) -> float:
        """The lowest validation loss."""
        return min(self.losses)

    @property
    def minimum_step(self) -> int:
        """The first step that has it."""
        return self.steps[self.losses.index(self.minimum)]

    def first_reaching(self, loss: float) -> int | None:
        """The first evaluation with this loss or less; None if there is none."""
        reached = (
            step for step, value in zip(self.steps, self.losses, strict=True) if value <= loss
        )
        return next(reached, None)


Seeds = Mapping[int, LossCurve]  # runs of one cell, by seed


@dataclass(frozen=True)
class Statistic:
    """One number of a table.

    Args:
        value: in the unit of its column; None where no run reaches the baseline.
        deviation: sample standard deviation over seeds; None with fewer than two, or where the
            column has none.
        seeds: that went into it.
        reached: of them, how many reach the baseline's minimum; None where nothing asks.
    """

    value: float | None
    deviation: float | None = None
    seeds: tuple[int, ...] = ()
    reached: int | None = None


def minimum_loss(runs: Seeds) -> Statistic:
    """Mean and sample standard deviation of the lowest validation loss."""
    lowest = [run.minimum for run in runs.values()]
    return Statistic(
        fmean(lowest), stdev(lowest) if len(lowest) > 1 else None, seeds=tuple(sorted(runs))
    )


def median_steps(runs: Seeds) -> Statistic:
    """Median of the steps that the token budget takes."""
    return Statistic(
        float(median(run.total_steps for run in runs.values())), seeds=tuple(sorted(runs))
    )


def reduction_by_first_reaching(adaptive: Seeds, baseline: Seeds) -> Statistic:
    """Median of 100 (1 - a / b), in percent, over the seeds that reach.

    a is the step at which the adaptive run first has the baseline's lowest loss, b the step at
    which the baseline has it.
    """
    pairs = paired(adaptive, baseline)
    reductions = [
        100 * (1 - step / constant.minimum_step)
        for run, constant in pairs.values()
        if (step := run.first_reaching(constant.minimum)) is not None
    ]
    return Statistic(_median(reductions), seeds=tuple(pairs), reached=len(reductions))


def reduction_by_total_steps(adaptive: Seeds, baseline: Seeds) -> Statistic:
    """Median of 100 (1 - a / b), in percent; a and b are all steps of either run."""
    pairs = paired(adaptive, baseline)
    reductions = [
        100 * (1 - run.total_steps / constant.total_steps) for run, constant in pairs.values()
    ]
    return Statistic(_median(reductions), seeds=tuple(pairs))


def paired(adaptive: Seeds, baseline: Seeds) -> dict[int, tuple[LossCurve, LossCurve]]:
    """Runs of the same seed, by seed."""
    return {seed: (adaptive[seed], baseline[seed]) for seed in sorted(adaptive.keys() & baseline)}


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
