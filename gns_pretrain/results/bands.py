"""Several seeds of a curve as a mean and a band. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gns_pretrain.errors import InputError
from gns_pretrain.results.curves import Curve

Values = NDArray[np.float64]
MOST_POINTS = 2000  # of a drawn line; more only make the file larger


@dataclass(frozen=True)
class Band:
    """Seeds on a common grid; without a deviation it is a single run.

    Args:
        x: [points]; steps or tokens.
        mean: [points].
        deviation: [points]; sample standard deviation over seeds.
    """

    x: Values
    mean: Values
    deviation: Values | None


def over_seeds(
    curves: Sequence[Curve],
    *,
    transform: Callable[[Values], Values] = np.asarray,
    stepwise: bool = False,
) -> Band:
    """Mean and sample standard deviation of several curves, where all of them are known.

    Runs whose batch adapts were evaluated at different steps: each is interpolated onto all their
    points, from the latest first to the earliest last one.

    Args:
        curves: one a seed.
        transform: of the interpolated values; a perplexity is interpolated as a loss.
        stepwise: interpolate by the value before, as a batch size.

    Raises:
        InputError: they have no range in common.
    """
    if len(curves) == 1:
        return Band(curves[0].x, transform(curves[0].y), None)
    first = max(curve.x[0] for curve in curves)
    last = min(curve.x[-1] for curve in curves)
    if first > last:
        raise InputError(
            f"one seed's curve begins at {first:g}, after another's end at {last:g}; "
            "leave one of them out, or draw --each-seed"
        )
    points = np.unique(np.concatenate([curve.x for curve in curves]))
    grid = points[(points >= first) & (points <= last)]
    values = np.stack([transform(on_grid(curve, grid, stepwise=stepwise)) for curve in curves])
    return Band(grid, values.mean(axis=0), values.std(axis=0, ddof=1))


def on_grid(curve: Curve, grid: Values, *, stepwise: bool) -> Values:
    """A curve at points within its range: [points], float64."""
    if stepwise:
        return curve.y[np.searchsorted(curve.x, grid, side="right") - 1]
    return np.interp(grid, curve.x, curve.y)


def thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """At most MOST_POINTS of the points, evenly, first and last among them."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)
    return x[kept], y[kept]
