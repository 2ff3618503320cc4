"""How far a statistic of R samples is to be trusted, from leaving out one sample at a time."""

import math
from collections.abc import Callable


def jackknife(statistic: Callable[[int | None], float], num_samples: int) -> tuple[float, float]:
    """A statistic and its standard error (Efron and Stein 1981).

        se^2 = (R - 1) / R * sum_j (t_j - mean_j t_j)^2,    t_j the statistic without sample j

    For a mean it is exactly s / sqrt(R); for smooth statistics it errs to the large side on
    average. Near a ratio's pole (a signal that could be zero) no such interval is meaningful.

    Args:
        statistic: called with a sample's index to leave out, and once with None for all samples.
        num_samples: R, at least 2 more samples than the statistic itself needs is wise.

    Returns:
        The statistic of all samples, and its standard error in the same unit.
    """
    left_out = [statistic(index) for index in range(num_samples)]
    mean = math.fsum(left_out) / num_samples
    squares = math.fsum((value - mean) ** 2 for value in left_out)
    return statistic(None), math.sqrt((num_samples - 1) / num_samples * squares)
