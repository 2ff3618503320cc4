"""Estimators by hand, one equation each."""

import math

import pytest
import torch

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.equations import (
    coordinate_variance,
    euclidean_signal_total,
    gram_covariance,
    manhattan_noise_total,
    manhattan_signal_total,
    nuclear_totals,
    small_sample_factor,
)


def test_coordinate_variance_by_hand() -> None:
    # Two samples with gradients 1 and 3: mean 2, mean square 5, so 8 / 1 * (5 - 4) = 8.
    variance = coordinate_variance(
        torch.tensor([5.0]), torch.tensor([2.0]), batch_size=8, num_samples=2
    )
    torch.testing.assert_close(variance, torch.tensor([8.0]))


def test_rounding_below_zero_is_no_variance() -> None:
    mean = torch.tensor([1.0])
    variance = coordinate_variance(mean - 1e-7, mean, batch_size=8, num_samples=2)
    assert variance.item() == 0.0


def test_gram_covariance_by_hand() -> None:
    # One row, samples (1, 0) and (3, 2): mean Gram (1 + 13) / 2 = 7, Gram of the mean (2, 1) is 5.
    covariance = gram_covariance(
        torch.tensor([[7.0]]), torch.tensor([[5.0]]), batch_size=8, num_samples=2
    )
    torch.testing.assert_close(covariance, torch.tensor([[16.0]]))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_gram_covariance_is_the_covariance_summed_over_the_other_side(
    shape: tuple[int, int],
) -> None:
    samples = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).double()
    wide = samples if shape[0] < shape[1] else samples.mT
    mean = wide.mean(0)
    covariance = gram_covariance(
        (wide @ wide.mT).mean(0), mean @ mean.mT, batch_size=12, num_samples=4
    )
    by_column = sum(torch.cov(wide[:, :, column].T) for column in range(wide.shape[-1]))
    torch.testing.assert_close(covariance, 12 / 4 * by_column)


def test_totals_by_hand() -> None:
    variance, mean = torch.tensor([4.0, 9.0]), torch.tensor([-3.0, 4.0])
    assert euclidean_signal_total(mean) == 25.0
    assert manhattan_noise_total(variance) == 5.0
    assert manhattan_signal_total(mean) == 7.0


def test_totals_of_shards_add_up() -> None:
    variance = torch.rand(11, generator=torch.Generator().manual_seed(0))
    for total in (euclidean_signal_total, manhattan_noise_total):
        parts = total(variance[:7]) + total(variance[7:])
        assert parts.item() == pytest.approx(total(variance).item(), rel=1e-15)


def test_nuclear_totals_by_hand() -> None:
    # Samples M + E and M - E: mean Gram M M^T + E E^T, so C = 4 / 1 * E E^T and tr C^(1/2) is twice
    # ||E||_S1 = 5. The signal is ||M||_S1 = 2 + 1.
    mean = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    noise = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    mean_gram = mean @ mean.mT + noise @ noise.mT
    totals, proven = nuclear_totals(
        mean_gram[None].double(), (mean @ mean.mT)[None].double(), batch_size=4, num_samples=2
    )
    assert totals.flatten().tolist() == pytest.approx([14.0, 3.0], rel=1e-3)
    assert proven.all()


@pytest.mark.parametrize(
    ("num_samples", "squared"), [(2, 2 / math.pi), (4, 0.849), (8, 0.931), (32, 0.984)]
)
def test_small_sample_factors_are_the_known_ones(num_samples: int, squared: float) -> None:
    assert small_sample_factor(num_samples) ** 2 == pytest.approx(squared, abs=5e-4)


def test_a_single_sample_has_no_noise_to_compare() -> None:
    one = torch.ones(1, 1)
    for estimator in (coordinate_variance, gram_covariance):
        with pytest.raises(InputError, match=r"num_samples=1: .* at least 2 micro-batches"):
            estimator(one, one, batch_size=8, num_samples=1)
