"""What the estimators read on a noisy quadratic, on average, against its closed forms."""

import math

import pytest
import torch
from torch import Tensor

from gns_pretrain import NoiseMeter
from gns_pretrain.noise_scale.equations import small_sample_factor
from gns_pretrain.quadratic import NoisyQuadratic, QuadraticModel, QuadraticSettings
from gns_pretrain.quadratic.simulation import read

BATCH, SAMPLES, ROWS = 64, 8, 4000
PROBLEM = QuadraticSettings(dimension=6, noise_exponent=0.5).build()
THETA = torch.tensor([0.3, -0.2, 0.1, 1.0, -2.0, 0.0], dtype=torch.float64)


def sample_gradients(rows: int, num_samples: int = SAMPLES) -> Tensor:
    noise = torch.randn(num_samples, rows, 6, generator=torch.Generator().manual_seed(0)).double()
    spread = (PROBLEM.variance * num_samples / BATCH).sqrt()
    return PROBLEM.curvature * THETA + noise * spread


def averages(geometry: str, estimate: str) -> dict[str, tuple[float, float]]:
    """Mean and standard error of noise, signal and the signed root of the signal."""
    read_rows = read(sample_gradients(ROWS), torch.full((ROWS,), BATCH), geometry, estimate)
    totals = [readings[0].total for readings in read_rows]
    values = {
        "noise": [m.noise for m in totals],
        "signal": [m.signal for m in totals],
        "root": [math.copysign(abs(m.signal) ** 0.5, m.signal) for m in totals],
    }
    tensors = {name: torch.tensor(each) for name, each in values.items()}
    return {n: (t.mean().item(), t.std().item() / ROWS**0.5) for n, t in tensors.items()}


def folded_normal() -> tuple[Tensor, Tensor]:
    """Mean and variance of each coordinate's |g_i|."""
    mean, variance = PROBLEM.curvature * THETA, PROBLEM.variance / BATCH
    fold = (2 * variance / math.pi).sqrt() * (-(mean**2) / (2 * variance)).exp()
    fold += mean * torch.erf(mean / (2 * variance).sqrt())
    return fold, mean**2 + variance - fold**2


def test_euclidean_estimates_average_to_the_closed_form() -> None:
    noise, signal = PROBLEM.noise_scales(THETA)["euclidean"]
    for estimate, expected in (("plug_in", signal + noise / BATCH), ("debiased", signal)):
        found = averages("euclidean", estimate)
        assert abs(found["noise"][0] - noise) < 4 * found["noise"][1]
        assert abs(found["signal"][0] - expected) < 4 * found["signal"][1]


def test_manhattan_estimates_average_to_the_closed_form() -> None:
    noise, signal = PROBLEM.noise_scales(THETA)["manhattan"]
    # E (sum s_i)^2 = c4^2 (sum sigma_i)^2 + (1 - c4^2) sum sigma_i^2, coordinates being independent
    c4 = small_sample_factor(SAMPLES) ** 2
    expected_noise = c4 * noise + (1 - c4) * PROBLEM.variance.sum().item()
    mean, variance = folded_normal()
    expected_signal = (mean.sum() ** 2 + variance.sum()).item()
    assert expected_signal > 1.2 * signal  # the plug-in signal is biased up
    for estimate, factor in (("plug_in", 1.0), ("debiased", 1 / c4)):
        found = averages("manhattan", estimate)
        assert abs(found["noise"][0] - factor * expected_noise) < 4 * found["noise"][1]
        assert abs(found["signal"][0] - expected_signal) < 4 * found["signal"][1]


def test_cross_fitted_manhattan_signal_is_that_of_half_the_batch() -> None:
    # E <g_A, sign g_B> = sum mu_i (2 P(g_B,i has the sign of mu_i) - 1)
    mean = PROBLEM.curvature * THETA
    expected = (mean * torch.erf(mean / (4 * PROBLEM.variance / BATCH).sqrt())).sum().item()
    found, error = averages("manhattan", "cross_fitted")["root"]
    assert abs(found - expected) < 4 * error


def test_nuclear_estimate_nears_the_closed_form_with_many_samples() -> None:
    noise, signal = PROBLEM.noise_scales(THETA, shape=(2, 3))["nuclear"]
    samples = sample_gradients(1, 40_000).view(40_000, 1, 2, 3)
    found = read(samples, torch.tensor([BATCH]), "nuclear", "plug_in")[0][0].total
    # A variance over R samples is off by (2 / R)^(1/2) of itself.
    assert found.noise == pytest.approx(noise, rel=4 * (2 / 40_000) ** 0.5)
    noiseless = (PROBLEM.curvature * THETA).view(1, 1, 2, 3).expand(2, 1, 2, 3)
    found = read(noiseless, torch.tensor([BATCH]), "nuclear", "plug_in")[0][0].total
    assert found.signal == pytest.approx(signal)


def test_expected_noise_scale_of_a_normal_start() -> None:
    squares = torch.tensor([1.0, 4.0, 0.25, 1.0, 2.0, 3.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    gradients = (
        torch.randn(100_000, 6, generator=draw).double() * squares.sqrt() * PROBLEM.curvature
    )
    found = PROBLEM.expected_noise_scales(squares)
    for name, norms in (
        ("euclidean", gradients.square().sum(1)),
        ("manhattan", gradients.abs().sum(1)),
    ):
        noise, signal = found[name]
        assert noise == PROBLEM.noise_scales(squares)[name][0]
        expected = signal if name == "euclidean" else signal**0.5
        assert abs(norms.mean() - expected) < 4 * norms.std() / len(norms) ** 0.5


def test_a_meter_on_the_module_reads_what_rows_read() -> None:
    gradients = sample_gradients(1).float()
    geometries = ["euclidean", "manhattan", "nuclear"]
    model = QuadraticModel(PROBLEM, THETA.float().view(2, 3))
    meter = NoiseMeter(model, geometries=geometries, estimates=["plug_in", "cross_fitted"])
    noise = gradients[:, 0] - model.curvature.flatten() * THETA.float()
    with meter.step(1):
        for row in noise:
            with meter.sample():
                (model(row[None]) / SAMPLES).backward()
    for reading in meter.read(batch_size=BATCH):
        total = reading.total
        samples = gradients.view(SAMPLES, 1, 2, 3)
        rows = read(samples, torch.tensor([BATCH]), total.geometry, total.estimate)
        assert total.noise == pytest.approx(rows[0][0].total.noise, rel=1e-5)
        assert total.signal == pytest.approx(rows[0][0].total.signal, rel=1e-5)


def test_own_curvature_and_noise() -> None:
    # ||g||^2 = 1 + 4 and tr C = 9 + 16; ||g||_1 = 3 and sum sigma = 7.
    one = torch.ones(2, dtype=torch.float64)
    problem = NoisyQuadratic(one * torch.tensor([1.0, 2.0]), one * torch.tensor([9.0, 16.0]), one)
    assert problem.noise_scales(one) == {"euclidean": (25.0, 5.0), "manhattan": (49.0, 9.0)}
