"""Averages of noise and signal: Eq. 23, signs, skipped measurements and saving."""

import dataclasses
import json
import math
import random
import statistics

import pytest
import torch

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.equations import share_given_up
from gns_pretrain.noise_scale.geometries import Measurement, part_sizes
from gns_pretrain.noise_scale.smoothing import (
    SPREAD_OVER,
    Averages,
    NoiseTracker,
    SmoothedProgress,
    SmoothingSettings,
    include,
    smoothed,
    tracker_of,
)


def measurement(noise: float, signal: float, estimate: str = "plug_in") -> Measurement:
    return Measurement("manhattan", estimate, noise, signal, num_samples=8, batch_size=64)


def average(
    measurements: list[Measurement], settings: SmoothingSettings, averages: Averages | None = None
) -> Averages:
    averages = averages or Averages()
    for each in measurements:
        averages = include(averages, each, settings)
    return averages


def test_averages_by_hand() -> None:
    settings = SmoothingSettings(noise_decay=0.5, signal_decay=0.75, bias_corrected=False)
    averages = average([measurement(8.0, 16.0), measurement(4.0, 8.0)], settings)
    # Noise: 0.5 * 8 = 4, then 2 + 2 = 4. Signal: 0.25 * 16 = 4, then 3 + 2 = 5.
    result = smoothed(averages, "plug_in", settings)
    assert (result.noise, result.signal, result.noise_scale) == (4.0, 5.0, 0.8)


def test_the_first_average_is_the_first_measurement_when_bias_corrected() -> None:
    settings = SmoothingSettings(noise_decay=0.9, signal_decay=0.99)
    result = smoothed(average([measurement(8.0, 16.0)], settings), "plug_in", settings)
    assert result.noise == pytest.approx(8.0, rel=1e-14)
    assert result.signal == pytest.approx(16.0, rel=1e-13)


def test_with_one_decay_the_noise_scale_does_not_depend_on_the_start() -> None:
    measurements = [measurement(8.0, 16.0), measurement(4.0, 9.0), measurement(5.0, 3.0)]
    scales = []
    for bias_corrected in (True, False):
        settings = SmoothingSettings(bias_corrected=bias_corrected)
        scales.append(smoothed(average(measurements, settings), "plug_in", settings).noise_scale)
    assert scales[0] == pytest.approx(scales[1], rel=1e-14)


def test_noise_and_signal_are_averaged_before_the_ratio_is_taken() -> None:
    settings = SmoothingSettings(noise_decay=0.5, signal_decay=0.5, bias_corrected=False)
    averages = average([measurement(8.0, 2.0), measurement(2.0, 4.0)], settings)
    # (2 + 1) / (0.5 + 2) = 1.2; the average of the ratios 4 and 0.5 would be 1.25.
    assert smoothed(averages, "plug_in", settings).noise_scale == pytest.approx(1.2)


def test_a_cross_fitted_signal_is_averaged_with_its_sign_and_then_squared() -> None:
    settings = SmoothingSettings(noise_decay=0.5, signal_decay=0.5, bias_corrected=False)
    # s = 6 and s = -2, so M = s |s| = 36 and -4; the average of s is 3 / 2 - 1 = 0.5.
    averages = average(
        [measurement(8.0, 36.0, "cross_fitted"), measurement(8.0, -4.0, "cross_fitted")], settings
    )
    result = smoothed(averages, "cross_fitted", settings)
    assert result.signal == pytest.approx(0.25)
    assert result.noise_scale == pytest.approx(6.0 / 0.25)


def test_cross_fitted_averages_of_pure_noise_are_not_biased_up() -> None:
    settings = SmoothingSettings(noise_decay=0.0, signal_decay=0.999)
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    measurements = [measurement(1.0, s * abs(s), "cross_fitted") for s in draws]
    averages = average(measurements, settings)
    # Standard deviation of such an average: sqrt((1 - beta) / (1 + beta)) = 0.022; the mean of
    # max(s, 0), which clamping each would give, is 0.40.
    assert abs(averages.signal) < 4 * 0.0224


@pytest.mark.parametrize("estimate", ["debiased", "cross_fitted"])
def test_a_negative_average_is_clamped_and_decides_nothing(estimate: str) -> None:
    settings = SmoothingSettings()
    averages = average([measurement(8.0, -4.0, estimate)], settings)
    result = smoothed(averages, estimate, settings)
    assert result.signal == 0.0
    assert result.noise_scale is None
    assert averages.signal < 0.0  # kept: the next measurement may outweigh it


def tracker(*measurements: Measurement) -> NoiseTracker:
    it = NoiseTracker("manhattan", "plug_in", SmoothingSettings())
    for each in measurements:
        it.include(each)
    return it


def test_a_measurement_that_is_not_finite_or_of_another_kind_changes_nothing() -> None:
    other = Measurement("nuclear", "plug_in", 1.0, 1.0, num_samples=8, batch_size=64)
    for left_out in (
        measurement(math.nan, 1.0),
        measurement(1.0, math.inf),
        measurement(1.0, 1.0, "debiased"),
        other,
    ):
        assert tracker(left_out).smoothed is None
        found = tracker(measurement(8.0, 16.0), left_out).state_dict()
        assert found == tracker(measurement(8.0, 16.0)).state_dict()


def test_before_any_measurement_there_is_no_noise_scale() -> None:
    assert smoothed(Averages(), "plug_in", SmoothingSettings()).noise_scale is None
    assert tracker().smoothed is None


def test_spread_is_the_deviation_of_the_last_measurements_and_skips_those_without_signal() -> None:
    assert tracker(measurement(3.0, 1.0)).spread is None
    assert tracker(measurement(3.0, 1.0), measurement(3.0, -1.0)).spread is None
    # 3 and 5: one apart from their mean on either side, so sqrt(2).
    assert tracker(measurement(3.0, 1.0), measurement(5.0, 1.0)).spread == pytest.approx(2**0.5)
    sevens = [measurement(7.0, 1.0)] * SPREAD_OVER
    assert tracker(measurement(3.0, 1.0), *sevens).spread == 0.0


def test_tracker_resumes_from_its_state_bit_for_bit() -> None:
    first, second, third = (measurement(1 / n, 1 / (n + 4)) for n in (3, 5, 7))
    resumed = tracker()
    resumed.load_state_dict(json.loads(json.dumps(tracker(first, second).state_dict())))
    resumed.include(third)
    assert resumed.state_dict() == tracker(first, second, third).state_dict()
    assert resumed.spread == tracker(first, second, third).spread


def test_averages_survive_a_json_file_exactly() -> None:
    settings = SmoothingSettings()
    first, second = measurement(1 / 3, 1 / 7), measurement(2 / 3, 5 / 7)
    saved = json.loads(json.dumps(dataclasses.asdict(average([first], settings))))
    assert all(isinstance(value, float) for value in saved.values())
    resumed = average([second], settings, Averages(**saved))
    assert resumed == average([first, second], settings)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_decays_outside_the_unit_interval_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"noise_scale\.smoothing\.noise_decay=.* below 1"):
        SmoothingSettings(noise_decay=value)
    with pytest.raises(InputError, match=r"noise_scale\.smoothing\.signal_decay=.* below 1"):
        SmoothingSettings(signal_decay=value)


def progress(num: int, *, batch_size: int = 64, bend: float = 100.0, seed: int = 0) -> NoiseTracker:
    """What has seen gains of a curve, off by 1 % each."""
    it = tracker_of("manhattan", "nested", SmoothingSettings())
    draw = random.Random(seed)
    for _ in range(num):
        gains = [math.sqrt(n / (n + bend)) * draw.gauss(1, 0.01) for n in part_sizes(batch_size, 8)]
        it.include(Measurement("manhattan", "nested", 0.0, 0.0, 8, batch_size, tuple(gains)))
    return it


def test_progress_is_the_curve_through_mean_gains() -> None:
    it = progress(10)
    assert it.smoothed is not None
    assert it.smoothed.noise_scale == pytest.approx(100.0, rel=0.2)
    # Gains of 0, and the tenth as large, average to half: the same bend.
    zero = Measurement("manhattan", "nested", 0.0, 0.0, 8, 64, (0.0, 0.0, 0.0))
    exact = tuple(math.sqrt(n / (n + 100.0)) for n in part_sizes(64, 8))
    it = tracker_of("manhattan", "nested", SmoothingSettings())
    for gains in (exact, (0.0, 0.0, 0.0)):
        it.include(dataclasses.replace(zero, gains=gains))
    assert it.smoothed is not None
    assert it.smoothed.noise_scale == pytest.approx(100.0, rel=0.05)
    assert it.smoothed.signal == pytest.approx(0.25, rel=0.05)


def test_progress_forgets_all_but_the_last_ten_measurements() -> None:
    old, new = progress(10, bend=1.0), progress(10, bend=1e4)
    state = new.state_dict()
    old.load_state_dict(state)
    assert old.smoothed == new.smoothed
    assert len(progress(25).state_dict()["recent"]) == len(state["recent"])


def test_standard_error_of_the_share_given_up_is_its_spread_over_runs() -> None:
    curves = [progress(10, seed=seed).smoothed for seed in range(100)]
    found = [curve.share_given_up(64) for curve in curves if isinstance(curve, SmoothedProgress)]
    shares, errors = zip(*found, strict=True)
    assert statistics.fmean(shares) == pytest.approx(share_given_up(64, 100.0), abs=0.02)
    # A standard deviation of 100 draws is within 20 % of the true one by 3 errors of its own.
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(shares), rel=0.25)


def test_gains_that_are_not_finite_are_left_out() -> None:
    it = progress(3)
    before = it.state_dict()
    it.include(Measurement("manhattan", "nested", 0.0, 0.0, 8, 64, (1.0, math.nan, 1.0)))
    assert it.state_dict() == before
