"""What each estimate estimates, on gradients with a known mean and covariance.

A sequence's gradient is normal with mean `mean` and independent coordinates of deviation `sigma`,
so a sample of B / R sequences has deviation sigma * sqrt(R / B). Averages over many draws must lie
within four standard errors of what they estimate; the draws are seeded, and a right estimator fails
one such check in 16,000.
"""

import math

import pytest
import torch
from torch import Tensor

from gns_pretrain.geometry import directions
from gns_pretrain.geometry.square_root import smaller_side_gram, trace_square_root
from gns_pretrain.noise_scale import equations
from gns_pretrain.noise_scale.geometries import GEOMETRIES, Measurement
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from tests import dual_norms

NUM_SAMPLES = 8
NUM_DRAWS = 2000
REGIMES = {"far below": 1 / 64, "near": 1.0, "far above": 64.0}  # B relative to the noise scale


class KnownGradient:
    """A gradient of `shape`, with both the Euclidean and the Manhattan noise scale near 1000."""

    def __init__(self, *shape: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.sigma = 0.5 + torch.rand(shape, generator=self.generator, dtype=torch.float64)
        self.mean = self.normal(*shape) * self.sigma / math.sqrt(1000)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def means(self, batch_size: int, num_draws: int) -> Tensor:
        """[num_draws, *shape]; mean gradients of batches."""
        return self.samples(batch_size, num_samples=1, num_draws=num_draws).squeeze(1)

    def samples(
        self, batch_size: int, num_samples: int = NUM_SAMPLES, num_draws: int = NUM_DRAWS
    ) -> Tensor:
        """[num_draws, num_samples, *shape]; mean gradients of the samples of a batch."""
        noise = self.normal(num_draws, num_samples, *self.mean.shape)
        return self.mean + self.sigma * math.sqrt(num_samples / batch_size) * noise


def batch_sizes(noise_scale: float) -> list[int]:
    return [NUM_SAMPLES * round(share * noise_scale / NUM_SAMPLES) for share in REGIMES.values()]


def agree(values: Tensor, expected: float | Tensor) -> bool:
    """Whether averages (over the first axis) lie within four standard errors of what is expected.

    If `expected` is itself one value a draw, its standard error is added.
    """
    variance = values.var(dim=0) / len(values)
    if isinstance(expected, Tensor) and len(expected) == len(values):
        variance = variance + expected.var(dim=0) / len(expected)
        expected = expected.mean(dim=0)
    return bool(((values.mean(dim=0) - expected).abs() <= 4.0 * variance.sqrt()).all())


def variances(samples: Tensor, batch_size: int) -> Tensor:
    """Eq. 20 for each draw; [num_draws, *shape]."""
    return equations.coordinate_variance(
        samples.square().mean(1),
        samples.mean(1),
        batch_size=batch_size,
        num_samples=samples.shape[1],
    )


def measure(
    geometry: str, estimate: str, totals: list[Tensor], batch_size: int, num_samples: int
) -> Measurement:
    """From totals without a cross-fitted signal."""
    columns = [*(total.item() for total in totals), 0.0, 0.0, 0.0]
    it = GEOMETRIES[geometry](NoiseScaleSettings())
    return it.measure(
        estimate, columns[: len(it.columns)], batch_size=batch_size, num_samples=num_samples
    )


def halves(samples: Tensor) -> tuple[Tensor, Tensor]:
    """g_A and g_B of each draw."""
    signed = samples[:, 0::2].sum(1) - samples[:, 1::2].sum(1)
    num_odd = samples.shape[1] // 2
    return equations.half_means(
        samples.sum(1), signed, num_even=samples.shape[1] - num_odd, num_odd=num_odd
    )


@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_variances_and_covariances_are_unbiased(num_samples: int) -> None:
    gradient = KnownGradient(3, 5)
    samples = gradient.samples(64, num_samples)
    assert agree(variances(samples, 64), gradient.sigma.square())
    mean = samples.mean(1)
    covariance = equations.gram_covariance(
        (samples @ samples.mT).mean(1), mean @ mean.mT, batch_size=64, num_samples=num_samples
    )
    assert agree(covariance, torch.diag(gradient.sigma.square().sum(1)))


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
def test_euclidean_estimates(regime: int) -> None:
    gradient = KnownGradient(60)
    noise = gradient.sigma.square().sum().item()  # tr C
    squared_norm = gradient.mean.square().sum().item()
    batch_size = batch_sizes(noise / squared_norm)[regime]
    samples = gradient.samples(batch_size)
    measured = []
    for draw in samples:
        totals = [draw.square().sum(), equations.euclidean_signal_total(draw.mean(0))]
        plug_in, debiased = (
            measure("euclidean", estimate, totals, batch_size, NUM_SAMPLES)
            for estimate in ("plug_in", "debiased")
        )
        measured.append([plug_in.noise, plug_in.signal, debiased.noise, debiased.signal])
    # The known bias: E||g||^2 = ||true gradient||^2 + tr C / B.
    expected = [noise, squared_norm + noise / batch_size, noise, squared_norm]
    assert agree(torch.tensor(measured), torch.tensor(expected))


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
def test_euclidean_cross_fitted_signal_is_the_gain_of_half_the_batch(regime: int) -> None:
    gradient = KnownGradient(60)
    batch_size = batch_sizes(1000)[regime]
    signals = torch.stack(
        [
            equations.euclidean_cross_signal(equations.euclidean_cross_totals(first, second))
            for first, second in zip(*halves(gradient.samples(batch_size)), strict=True)
        ]
    )
    # Independent batches of half the size, and what a unit step along each of them gains.
    steps = gradient.means(batch_size // 2, NUM_DRAWS)
    gains = (steps @ gradient.mean) / torch.linalg.vector_norm(steps, dim=1)
    assert agree(signals, gains)
    assert 0.0 < gains.mean() < dual_norms.euclidean(gradient.mean)


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
def test_manhattan_estimates(regime: int) -> None:
    gradient = KnownGradient(60)
    sigma, mean = gradient.sigma, gradient.mean
    batch_size = batch_sizes((sigma.sum() / mean.abs().sum()).item() ** 2)[regime]
    samples = gradient.samples(batch_size)
    measured = []
    for squares, sample_mean in zip(variances(samples, batch_size), samples.mean(1), strict=True):
        totals = [
            equations.manhattan_noise_total(squares),
            equations.manhattan_signal_total(sample_mean),
        ]
        plug_in, debiased = (
            measure("manhattan", estimate, totals, batch_size, NUM_SAMPLES)
            for estimate in ("plug_in", "debiased")
        )
        measured.append([math.sqrt(m) for m in (plug_in.noise, plug_in.signal, debiased.noise)])
    # |g_i| is a folded normal: its mean exceeds |mean_i|, by sqrt(2 / pi) deviations at mean 0.
    deviation = sigma / math.sqrt(batch_size)
    ratio = mean / deviation
    folded = deviation * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + mean * torch.erf(
        ratio / math.sqrt(2)
    )
    factor = equations.small_sample_factor(NUM_SAMPLES)
    total = sigma.sum().item()
    assert agree(torch.tensor(measured), torch.tensor([factor * total, folded.sum(), total]))


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
def test_manhattan_cross_fitted_signal_is_the_gain_of_half_the_batch(regime: int) -> None:
    gradient = KnownGradient(60)
    batch_size = batch_sizes(1000)[regime]
    signals = torch.stack(
        [
            equations.manhattan_cross_total(first, second)
            for first, second in zip(*halves(gradient.samples(batch_size)), strict=True)
        ]
    )
    # E sign(g_i) = erf(mean_i / (sqrt(2) * deviation)), the deviation that of half the batch.
    deviation = gradient.sigma / math.sqrt(batch_size / 2)
    gain = gradient.mean @ torch.erf(gradient.mean / deviation / math.sqrt(2))
    assert agree(signals, gain.item())


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
@pytest.mark.parametrize("stride", [8, 4])
def test_nested_gains_are_those_of_steps_of_the_parts(regime: int, stride: int) -> None:
    gradient = KnownGradient(6, 10)
    batch_size = batch_sizes(1000)[regime]
    samples = gradient.samples(batch_size)
    total, part = samples.sum(1), samples[:, ::stride].sum(1)
    parts = equations.part_means(total, part, num_part=8 // stride, num_samples=NUM_SAMPLES)
    # Steps along independent batches of the part's size, met by the true gradient.
    steps = gradient.means(batch_size // stride, NUM_DRAWS)

    def along(direction: Tensor) -> Tensor:
        return (direction * gradient.mean).sum((1, 2))

    pairs = list(zip(*parts, strict=True))
    euclidean = [equations.euclidean_part_totals(*pair) for pair in pairs]
    signals = torch.stack([product / square.sqrt() for product, square in euclidean])
    assert agree(signals, along(steps / torch.linalg.matrix_norm(steps)[:, None, None]))
    signals = torch.stack([equations.manhattan_part_total(*pair) for pair in pairs])
    assert agree(signals, along(steps.sign()))
    signals = equations.nuclear_part_total(*equations.part_grams(*parts))
    assert agree(signals, along(directions.matrix_sign(steps)))


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
def test_a_normalized_step_gives_up_what_the_curve_says(regime: int) -> None:
    gradient = KnownGradient(600)
    noise = (gradient.sigma.square().sum() / gradient.mean.square().sum()).item()
    batch_size = batch_sizes(noise)[regime]
    gains = []
    for size in (batch_size, 2 * batch_size):
        steps = gradient.means(size, NUM_DRAWS)
        gains.append((steps @ gradient.mean / torch.linalg.vector_norm(steps, dim=1)).mean())
    given_up = 1 - (gains[1] / gains[0] / math.sqrt(2)).item()
    assert given_up == pytest.approx(equations.share_given_up(batch_size, noise), abs=0.01)


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_nuclear_estimates(regime: int, shape: tuple[int, int]) -> None:
    gradient = KnownGradient(*shape)
    batch_size = batch_sizes(1000)[regime]
    samples = gradient.samples(batch_size, num_draws=500)
    wide = samples if shape[0] < shape[1] else samples.mT
    gram_of_mean = smaller_side_gram(samples.mean(1))
    covariance = equations.gram_covariance(
        (wide @ wide.mT).mean(1), gram_of_mean, batch_size=batch_size, num_samples=NUM_SAMPLES
    )
    noise, signal = (
        trace_square_root(grams, mode="exact").values for grams in (covariance, gram_of_mean)
    )
    # The signal is the nuclear norm of a batch's gradient, which noise drives up.
    batches = torch.linalg.svdvals(gradient.means(batch_size, num_draws=500)).sum(1)
    assert agree(signal, batches)
    # The square root is concave: its trace is low, at 63 degrees of freedom by about 6 / (8 * 63).
    side = 1 if shape[0] < shape[1] else 0
    truth = gradient.sigma.square().sum(side).sqrt().sum()
    assert 0.97 < noise.mean() / truth < 1.0


@pytest.mark.parametrize("regime", range(3), ids=REGIMES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_nuclear_cross_fitted_signal_is_the_gain_of_half_the_batch(
    regime: int, shape: tuple[int, int]
) -> None:
    gradient = KnownGradient(*shape)
    batch_size = batch_sizes(1000)[regime]
    grams = equations.cross_grams(*halves(gradient.samples(batch_size)))
    signals = equations.nuclear_cross_total(*grams)
    steps = directions.matrix_sign(gradient.means(batch_size // 2, NUM_DRAWS))
    gains = (steps * gradient.mean).sum((1, 2))
    assert agree(signals, gains)
    assert 0.0 < gains.mean() < dual_norms.nuclear(gradient.mean)


@pytest.mark.parametrize("num_samples", [2, 4, 8, 32])
def test_few_samples_shrink_the_manhattan_noise(num_samples: int) -> None:
    gradient = KnownGradient(60)
    squares = variances(gradient.samples(64, num_samples), 64)
    totals = squares.sqrt().sum(1)
    known = {2: 0.637, 4: 0.849, 8: 0.931, 32: 0.984}[num_samples]
    # The known factors have three digits: they lie within 5e-4 of the truth.
    assert (totals.mean() / gradient.sigma.sum()).item() ** 2 == pytest.approx(
        known, abs=5e-4 + 8.0 * (totals.std() / gradient.sigma.sum() / NUM_DRAWS**0.5).item()
    )


def test_without_a_signal_the_plug_in_manhattan_noise_scale_reads_the_batch_size() -> None:
    gradient = KnownGradient(20_000)
    gradient.mean.zero_()
    batch_size, num_samples = 64, 32
    samples = gradient.samples(batch_size, num_samples, num_draws=1)
    totals = [
        equations.manhattan_noise_total(variances(samples, batch_size)),
        equations.manhattan_signal_total(samples.mean(1)),
    ]
    measurement = measure("manhattan", "plug_in", totals, batch_size, num_samples)
    # (sum sigma)^2 c4^2 / (sum sigma sqrt(2 / (pi B)))^2 = c4^2 (pi / 2) B. One |g_i| deviates by
    # 0.76 of its mean, the sum of 20,000 of unequal sigma by 0.0056, its square by twice that.
    assert measurement.noise_scale is not None
    assert measurement.noise_scale == pytest.approx(0.984 * math.pi / 2 * batch_size, rel=0.045)
    # At theta = 0.6 the batch would grow more than fourfold from noise alone.
    assert measurement.noise_scale / 0.6**2 > 4 * batch_size

    signal = equations.manhattan_cross_total(*halves(samples)).item()
    # Each half has variance sigma_i^2 / (B / 2); the two terms of s covary by E|g_A| E|g_B|.
    variance = (1 + 2 / math.pi) * gradient.sigma.square().sum().item() / batch_size
    assert abs(signal) < 4 * math.sqrt(variance)
