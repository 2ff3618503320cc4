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
]


def measured(geometry: str, estimate: str, *, noise: float, signal: float) -> Measurement:
    """From totals of noise and of signal, the cross-fitted one included."""
    if geometry == "euclidean":
        # N = (sum_j ||g^j||^2 / R - ||g||^2) B / (R - 1); <g_A, g_B> of halves of norm 1 is s.
        squares = NUM_SAMPLES * (noise * (NUM_SAMPLES - 1) / BATCH_SIZE + signal)
        totals = [squares, signal, signal, 1.0, 1.0]
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


def test_every_estimate_of_every_geometry_is_covered_by_hand() -> None:
    assert {(geometry, estimate) for geometry, estimate, _, _ in BY_HAND} == {
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
