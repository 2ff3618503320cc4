"""The jackknife: exact for a mean, honest for a ratio."""

import statistics

import pytest
import torch

from gns_pretrain.launch.measure_noise import jackknife


def test_the_error_of_a_mean_is_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]

    def mean(left_out: int | None) -> float:
        return statistics.fmean(v for index, v in enumerate(values) if index != left_out)

    estimate, error = jackknife(mean, len(values))
    assert estimate == 4.0
    assert error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5)


def test_the_error_of_a_ratio_matches_its_spread_over_many_draws() -> None:
    num_samples, num_draws = 32, 400
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(num_draws, num_samples, 2, generator=generator, dtype=torch.float64)
    pairs = pairs + torch.tensor([3.0, 6.0])
    estimates, errors = [], []
    for draw in pairs:
        totals = draw.sum(0)

        def ratio(
            left_out: int | None,
            draw: torch.Tensor = draw,
            totals: torch.Tensor = totals,
        ) -> float:
            kept = totals if left_out is None else totals - draw[left_out]
            return (kept[0] / kept[1]).item()

        estimate, error = jackknife(ratio, num_samples)
        estimates.append(estimate)
        errors.append(error)
    # The spread of 400 draws is known to 1 / sqrt(800) = 3.5 %: four of those.
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(estimates), rel=0.14)
