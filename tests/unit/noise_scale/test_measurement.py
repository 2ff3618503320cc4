"""From totals to noise, signal and noise scale, for every geometry and estimate."""

import math

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import (
    ESTIMATES,
    Measurement,
    check_estimate,
    measure,
)

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


@pytest.mark.parametrize(("geometry", "estimate", "noise", "signal"), BY_HAND)
def test_noise_and_signal_by_hand(
    geometry: str, estimate: str, noise: float, signal: float
) -> None:
    measurement = measure(
        geometry, estimate, noise_total=6.0, signal_total=2.0, batch_size=16, num_samples=2
    )
    assert measurement.noise == pytest.approx(noise)
    assert measurement.signal == pytest.approx(signal)
    assert measurement.noise_scale == pytest.approx(noise / signal)


def test_every_estimate_of_every_geometry_is_covered_by_hand() -> None:
    assert {(geometry, estimate) for geometry, estimate, _, _ in BY_HAND} == {
        (geometry, estimate) for geometry, estimates in ESTIMATES.items() for estimate in estimates
    }


@pytest.mark.parametrize("geometry", ESTIMATES)
def test_a_negative_cross_fitted_signal_keeps_its_sign_and_decides_nothing(geometry: str) -> None:
    measurement = measure(
        geometry, "cross_fitted", noise_total=6.0, signal_total=-2.0, batch_size=16, num_samples=2
    )
    assert measurement.signal == -4.0
    assert measurement.noise_scale is None
    assert measurement.skip_reason is None


def test_a_debiased_euclidean_signal_may_be_negative() -> None:
    measurement = measure(
        "euclidean", "debiased", noise_total=64.0, signal_total=2.0, batch_size=16, num_samples=2
    )
    assert measurement.signal == -2.0
    assert measurement.noise_scale is None


def test_layers_are_summed_before_they_are_squared() -> None:
    layers = {"noise": (1.0, 2.0), "signal": (2.0, 1.0)}
    measurement = measure(
        "nuclear",
        "plug_in",
        noise_total=sum(layers["noise"]),
        signal_total=sum(layers["signal"]),
        batch_size=16,
        num_samples=2,
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
    with pytest.raises(InputError, match=r"noise_scale\.geometries holds taxicab, .* use euclid"):
        check_estimate("taxicab", "plug_in")
    with pytest.raises(InputError, match="holds debiased, which geometry nuclear does not"):
        measure(
            "nuclear", "debiased", noise_total=1.0, signal_total=1.0, batch_size=16, num_samples=2
        )
