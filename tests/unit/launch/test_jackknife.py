"""The jackknife: exact for a mean, honest for a ratio."""

import statistics

import pytest
import torch

from gns_pretrain.launch.measure_noise import jackknife


def test_the_error_of_a_mean_is_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    error = jackknife([(sum(values) - value) / 3 for value in values])
    assert error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5)


def test_the_error_of_a_ratio_matches_its_spread_over_many_draws() -> None:
    num_samples, num_draws = 32, 400
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(num_draws, num_samples, 2, generator=generator, dtype=torch.float64)
    pairs = pairs + torch.tensor([3.0, 6.0])
    totals = pairs.sum(1)
    left_out = totals[:, None] - pairs
    errors = [jackknife(ratios) for ratios in (left_out[..., 0] / left_out[..., 1]).tolist()]
    estimates = (totals[:, 0] / totals[:, 1]).tolist()
    # The spread of 400 draws is known to 1 / sqrt(800) = 3.5 %: four of those.
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(estimates), rel=0.14)
