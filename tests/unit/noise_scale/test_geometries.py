"""From totals to noise, signal and noise scale, for every geometry and estimate."""

import math

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import GEOMETRIES, Measurement
from gns_pretrain.noise_scale.settings import NoiseScaleSettings

BATCH_SIZE, NUM_SAMPLES = 16, 2

# Totals of noise 6 and of signal 2, B = 16, R = 2 (c4^2 = 2 / pi).
BY_HAND = [
    ("euclidean", "plug_in", 6.0, 2.0),
    ("euclidean", "debiased", 6.0, 2.0 - 6.0 / 16),
    ("euclidean", "cross_fitted", 6.0, 4.0),
    ("manhattan", "plug_in", 36.0, 4.0),
    ("manhattan", "debiased", 36.0 * math.pi / 2, 4.0),
    ("manhattan", "cross_fitted", 36.0, 4.0),
    ("nuclear", "plug_in", 36.0, 4.0),
    ("nuclear", "cross_fitted", 36.0, 4.0),
    ("adam", "plug_in", 6.0, 2.0),
    ("adam", "debiased", 6.0, 2.0 - 6.0 / 16),
    ("adam", "cross_fitted", 6.0, 4.0),
    ("composite", "plug_in", 36.0, 4.0),
    ("composite", "cross_fitted", 36.0, 4.0),
]


def measured(geometry: str, estimate: str, *, noise: float, signal: float) -> Measurement:
    """From totals of noise and of signal, the cross-fitted one included."""
    if geometry in ("euclidean", "adam"):
        # N = (sum_j ||g^j||^2 / R - ||g||^2) B / (R - 1); <g_A, g_B> of halves of norm 1 is s.
        squares = NUM_SAMPLES * (noise * (NUM_SAMPLES - 1) / BATCH_SIZE + signal)
        totals = [squares, signal, signal, 1.0, 1.0]
    elif geometry == "composite":  # a third of each root is of the matrices
        totals = [total * part for part in (1 / 3, 2 / 3) for total in (noise, signal, signal)]
    else:
        totals = [noise, signal, signal]
    it = GEOMETRIES[geometry](NoiseScaleSettings())
    return it.measure(estimate, totals, batch_size=BATCH_SIZE, num_samples=NUM_SAMPLES)


@pytest.mark.parametrize(("geometry", "estimate", "noise", "signal"), BY_HAND)
def test_noise_and_signal_by_hand(
    geometry: str, estimate: str, noise: float, signal: float
) -> None:
    measurement = measured(geometry, estimate, noise=6.0, signal=2.0)
    assert measurement.noise == pytest.approx(noise)
    assert measurement.signal == pytest.approx(signal)
    assert measurement.noise_scale == pytest.approx(noise / signal)


# P(n) = 3 sqrt(n / (n + 8)) at an eighth, a quarter and half of B = 16: bend 8, N = 72, M = 9.
GAINS = [3 * math.sqrt(n / (n + 8)) for n in (2, 4, 8)]
EIGHTH, QUARTER, HALF = GAINS
NESTED = {
    # Products with parts of norm 2, and <g_A, g_B> of halves of norm 1.
    "euclidean": [0.0, 0.0, HALF, 1.0, 1.0, 2 * EIGHTH, 4.0, 2 * QUARTER, 4.0],
    "adam": [0.0, 0.0, HALF, 1.0, 1.0, 2 * EIGHTH, 4.0, 2 * QUARTER, 4.0],
    "manhattan": [0.0, 0.0, HALF, EIGHTH, QUARTER],
    "nuclear": [0.0, 0.0, HALF, EIGHTH, QUARTER, 0.0],
}


@pytest.mark.parametrize("geometry", NESTED)
def test_nested_gains_and_their_curve_by_hand(geometry: str) -> None:
    it = GEOMETRIES[geometry](NoiseScaleSettings())
    found = it.measure("nested", NESTED[geometry], batch_size=16, num_samples=8)
    assert found.gains == pytest.approx(GAINS)
    assert found.sizes == [2, 4, 8]
    # The fit is on a grid of 5 %.
    assert (found.noise, found.signal) == pytest.approx((72.0, 9.0), rel=0.05)


@pytest.mark.parametrize(
    ("gains", "noise_scale"),
    [((1.0, 1.5, 2.2), math.inf), ((2.0, 1.9, 2.0), 0.0), ((-1, 0, 0), None)],
)
def test_gains_without_a_bend_or_a_rise(gains: tuple[float, ...], noise_scale: float) -> None:
    totals = [0.0, 0.0, gains[2], gains[0], gains[1]]
    it = GEOMETRIES["manhattan"](NoiseScaleSettings())
    found = it.measure("nested", totals, batch_size=16, num_samples=8)
    assert found.noise_scale == noise_scale
    assert found.skip_reason is None


def test_every_estimate_of_every_geometry_is_covered_by_hand() -> None:
    covered = {(geometry, estimate) for geometry, estimate, _, _ in BY_HAND}
    assert covered | {(geometry, "nested") for geometry in NESTED} == {
        (name, estimate) for name, it in GEOMETRIES.items() for estimate in it.estimates
    }


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_negative_cross_fitted_signal_keeps_its_sign_and_decides_nothing(geometry: str) -> None:
    measurement = measured(geometry, "cross_fitted", noise=6.0, signal=-2.0)
    assert measurement.signal == -4.0
    assert measurement.noise_scale is None
    assert measurement.skip_reason is None


def test_a_debiased_euclidean_signal_may_be_negative() -> None:
    measurement = measured("euclidean", "debiased", noise=64.0, signal=2.0)
    assert measurement.signal == -2.0
    assert measurement.noise_scale is None


def test_layers_are_summed_before_they_are_squared() -> None:
    layers = {"noise": (1.0, 2.0), "signal": (2.0, 1.0)}
    measurement = measured(
        "nuclear", "plug_in", noise=sum(layers["noise"]), signal=sum(layers["signal"])
    )
    assert (measurement.noise, measurement.signal) == (9.0, 9.0)  # not 1 + 4


def test_a_measurement_that_is_not_finite_says_why_it_is_skipped() -> None:
    assert Measurement("nuclear", "plug_in", math.nan, 1.0, 8, 64).skip_reason == (
        "nuclear noise is nan"
    )
    assert Measurement("manhattan", "plug_in", 1.0, math.inf, 8, 64).skip_reason == (
        "manhattan signal is inf"
    )


def test_unknown_geometries_and_missing_estimates_are_refused() -> None:
    with pytest.raises(InputError, match=r"noise_scale\.geometries=\[taxicab\] .* one of eu"):
        NoiseScaleSettings(["taxicab"])
    with pytest.raises(InputError, match=r"noise_scale\.estimates holds plugin"):
        NoiseScaleSettings(["nuclear"], ["plugin"])
    with pytest.raises(InputError, match="holds debiased, which geometry nuclear does not"):
        measured("nuclear", "debiased", noise=1.0, signal=1.0)
