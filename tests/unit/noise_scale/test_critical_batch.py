"""Batch sizes from a noise scale, each against the curve of expected gain that defines it."""

import math

import pytest
import torch

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.equations import (
    dual_norm_fraction_batch,
    dual_norm_goodput_batch,
    euclidean_fraction_batch,
    euclidean_goodput_batch,
    inflection_batch,
    inflection_v1_batch,
    maximum_efficiency_batch,
    muon_critical_batch,
    target_batch_size,
)
from gns_pretrain.noise_scale.geometries import GEOMETRIES

NOISE_SCALE = 10.0


def euclidean_gain(batch_size: float) -> float:
    return 1.0 / (1.0 + NOISE_SCALE / batch_size)  # Eq. 18


def dual_norm_gain(batch_size: float) -> float:
    return dual_norm_gains(torch.tensor(batch_size, dtype=torch.float64)).item()


def dual_norm_gains(batch_sizes: torch.Tensor) -> torch.Tensor:
    return (1.0 - (NOISE_SCALE / batch_sizes).sqrt()).square()  # Eqs. 18, 35


def test_target_by_hand() -> None:
    assert target_batch_size(36.0, 4.0, theta=0.6) == pytest.approx(25.0)  # 9 / 0.36


def test_target_reaches_its_share_of_the_largest_gain() -> None:
    target = target_batch_size(NOISE_SCALE, 1.0, theta=0.6)
    assert target is not None
    assert dual_norm_gain(target) == pytest.approx((1 - 0.6) ** 2)
    assert target == pytest.approx(dual_norm_fraction_batch(NOISE_SCALE, kappa=0.16))


@pytest.mark.parametrize("signal", [0.0, -1.0])
def test_without_a_positive_signal_there_is_no_target(signal: float) -> None:
    assert target_batch_size(36.0, signal, theta=0.6) is None


@pytest.mark.parametrize("kappa", [0.1, 0.5, 0.9])
def test_fraction_batches_reach_their_fraction(kappa: float) -> None:
    euclidean = euclidean_fraction_batch(NOISE_SCALE, kappa=kappa)
    assert euclidean_gain(euclidean) == pytest.approx(kappa)
    dual_norm = dual_norm_fraction_batch(NOISE_SCALE, kappa=kappa)
    assert dual_norm_gain(dual_norm) == pytest.approx(kappa)


def test_half_the_largest_gain_takes_one_euclidean_noise_scale() -> None:
    assert euclidean_fraction_batch(NOISE_SCALE, kappa=0.5) == NOISE_SCALE


def test_the_first_versions_inflection_is_the_root_of_its_second_derivative() -> None:
    batch = inflection_v1_batch(NOISE_SCALE)
    assert batch == pytest.approx(64 / 9 * NOISE_SCALE)
    printed = -1.5 * NOISE_SCALE**0.5 * batch**-2.5, 4.0 * NOISE_SCALE * batch**-3.0  # Eq. 42
    assert sum(printed) == pytest.approx(0.0, abs=1e-12 * printed[1])
    assert dual_norm_gain(batch) == pytest.approx(25 / 64)


def test_the_gain_bends_at_the_inflection() -> None:
    curvatures = []
    for factor in (0.99, 1.0, 1.01):
        value = factor * inflection_batch(NOISE_SCALE)
        batch = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(dual_norm_gains(batch), batch, create_graph=True)
        curvatures.append(torch.autograd.grad(slope, batch)[0].item())
    assert curvatures[0] > 0.0 > curvatures[2]
    assert abs(curvatures[1]) < 1e-10 * curvatures[0]


def test_the_gain_per_sequence_is_largest_at_maximum_efficiency() -> None:
    batches = torch.linspace(1.0, 20.0, 19_001, dtype=torch.float64) * NOISE_SCALE
    best = batches[(dual_norm_gains(batches) / batches).argmax()].item()
    assert maximum_efficiency_batch(NOISE_SCALE) == pytest.approx(best, rel=1e-3)  # the grid's
    assert maximum_efficiency_batch(NOISE_SCALE) == 40.0


@pytest.mark.parametrize("overhead", [0.0, 1.0, 70.0, 1e4])
@pytest.mark.parametrize(
    ("goodput_batch", "gains", "smallest"),
    [
        (euclidean_goodput_batch, lambda sizes: sizes / (sizes + NOISE_SCALE), 0.0),
        (dual_norm_goodput_batch, dual_norm_gains, 40.0),
    ],
)
def test_the_gain_per_second_is_largest_at_the_goodput_batch(
    goodput_batch, gains, smallest, overhead
) -> None:
    found = goodput_batch(NOISE_SCALE, overhead=overhead)
    assert found >= smallest * (1 - 1e-12)
    if found > 0.0:
        sizes = found * torch.linspace(0.5, 2.0, 15_001, dtype=torch.float64)
        sizes = sizes[sizes > NOISE_SCALE] if smallest else sizes
        best = sizes[(gains(sizes) / (overhead + sizes)).argmax()].item()
        assert found == pytest.approx(best, rel=1e-3)  # the grid's
    assert goodput_batch(NOISE_SCALE, overhead=math.inf) == math.inf
    assert goodput_batch(0.0, overhead=overhead) == 0.0


@pytest.mark.parametrize("theta", [0.0, -0.3, math.nan])
def test_a_theta_that_is_not_positive_is_refused(theta: float) -> None:
    with pytest.raises(InputError, match=r"batch_size\.theta=.* must be positive"):
        target_batch_size(1.0, 1.0, theta=theta)


@pytest.mark.parametrize(("theta", "target"), [(1e-200, math.inf), (1e200, 0.0)])
def test_a_theta_whose_square_is_no_number_still_gives_a_target(
    theta: float, target: float
) -> None:
    assert target_batch_size(1.0, 1.0, theta=theta) == target


def test_a_theta_of_one_or_more_asks_for_less_than_the_noise_scale() -> None:
    assert target_batch_size(36.0, 4.0, theta=1.0) == 9.0
    assert target_batch_size(36.0, 4.0, theta=3.0) == 1.0


def noise_alone(shape: tuple[int, int], batch_size: int) -> dict[str, float]:
    """Noise scales over B of matrices whose true gradient is zero, sigma = 1, noise known."""
    draws, (rows, columns) = 40, shape
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(draws, rows, columns, generator=generator, dtype=torch.float64)
    mean /= batch_size**0.5
    entries = rows * columns
    return {
        "euclidean": entries / mean.square().sum((1, 2)).mean().item() / batch_size,
        "manhattan": (entries / mean.abs().sum((1, 2)).mean().item()) ** 2 / batch_size,
        "nuclear": (min(shape) * max(shape) ** 0.5) ** 2
        / torch.linalg.svdvals(mean).sum(1).mean().item() ** 2
        / batch_size,
    }


def test_without_a_gradient_each_plug_in_scale_reads_its_threshold_squared_times_the_batch() -> (
    None
):
    # 4 standard errors of a mean over 40 x 64 x 64 entries are below 2 % of each; the nuclear
    # constant is the limit of large matrices, within 1 % at 64.
    for geometry, read in noise_alone((64, 64), batch_size=16).items():
        threshold = GEOMETRIES[geometry].noise_alone_theta
        assert threshold is not None
        assert read == pytest.approx(threshold**2, rel=0.02), geometry


def test_without_a_gradient_a_wide_matrix_reads_the_batch() -> None:
    assert noise_alone((4, 1024), batch_size=16)["nuclear"] == pytest.approx(1.0, rel=0.02)


def test_muons_critical_batch_takes_the_fewest_sequences_to_a_precision() -> None:
    noise, precision, momentum = 40.0, 0.5, 0.9
    coefficient = 2 * ((1 - momentum) / (1 + momentum) * noise) ** 0.5  # Y
    bound = muon_critical_batch(noise, precision=precision, momentum=momentum)
    batches = bound * torch.linspace(0.5, 4.0, 35_001, dtype=torch.float64)
    for offset in (0.0, 0.1):  # Z
        left = precision - offset - coefficient / batches.sqrt()  # X / T
        sequences = torch.where(left > 0, batches / left, math.inf)
        best = batches[sequences.argmin()].item()
        assert best == pytest.approx(bound * (precision / (precision - offset)) ** 2, rel=1e-3)


def test_half_of_muons_noise_coefficient_bounds_the_noise_of_a_momentum_average() -> None:
    momentum, batch_size, draws = 0.8, 4, 400
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(12, 20, generator=generator).double()
    average = torch.zeros(draws, 12, 20, dtype=torch.float64)
    for _ in range(40):
        noise = torch.randn(draws, 12, 20, generator=generator).double() * spread
        average = momentum * average + (1 - momentum) * noise / batch_size**0.5
    norm = torch.linalg.svdvals(average).sum(1).mean().item()
    total = spread.square().sum(1).sqrt().sum().item() ** 2  # N, the rows' covariance is diagonal
    critical = muon_critical_batch(total, precision=1.0, momentum=momentum)
    bound = (critical / 9 / batch_size) ** 0.5
    assert 0.7 * bound < norm < bound
