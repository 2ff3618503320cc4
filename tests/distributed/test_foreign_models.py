"""The noise scale of models that are not ours equals a dense float64 reference on every layout."""

import pytest
import torch

from gns_pretrain.errors import InputError
from tests.dense_reference import Values
from tests.distributed.exactness import (
    GEOMETRIES,
    NUM_SAMPLES,
    PLAIN,
    VARIANTS,
    Case,
    Measured,
    dense_of,
    largest_difference,
    loss_of,
    measure_all,
    meter_of,
    values_of,
)

# float32 rounds a sum of 8 sample gradients by about 8 * 6e-8 = 5e-7 of its size.
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Case, list[Measured]]:
    """Of each case, what every rank measured."""
    by_case: dict[Case, list[Measured]] = {}
    for case, measured in measure_all(PLAIN + VARIANTS, tmp_path_factory.mktemp("ranks")):
        by_case.setdefault(case, []).append(measured)
    return by_case


@pytest.mark.parametrize("case", PLAIN + VARIANTS, ids=str)
def test_equals_the_dense_reference(found, case):
    expected = dense_of(case)
    for rank, measured in enumerate(found[case]):
        for geometry in GEOMETRIES:
            difference = largest_difference(measured.values, expected, geometry)
            assert difference < RELATIVE, f"{geometry} on rank {rank}"


@pytest.mark.parametrize("case", PLAIN + VARIANTS, ids=str)
def test_measured_step_trains_with_the_same_bits(found, case):
    assert all(measured.same_bits for measured in found[case])


def scaled_step(scaler: torch.amp.GradScaler, *, unscale: bool = False, **reading) -> Values:
    """One measured step with a scaled loss."""
    case = Case("MLP", "one process")
    model = case.foreign.new()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = meter_of(model)
    with meter.step(1):
        for sample in case.foreign.samples(NUM_SAMPLES):
            with meter.sample():
                scaler.scale(loss_of(model(**sample)) / NUM_SAMPLES).backward()
    if unscale:
        scaler.unscale_(optimizer)
    return values_of(meter.read(NUM_SAMPLES * case.foreign.sample_size, **reading))


def test_scaled_loss_is_unscaled_in_the_reading(found):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = scaled_step(scaler, loss_scale=2.0**10)
    for key, values in found[Case("MLP", "one process")][0].values.items():
        assert scaled[key] == pytest.approx(values, rel=RELATIVE), key


def test_unscaled_gradients_of_a_scaled_loss_are_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with pytest.raises(InputError, match="differs from the mean of the measured samples"):
        scaled_step(scaler, unscale=True)
