import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gns_pretrain.data.order import SequenceOrder


def epoch_of(num_sequences: int, seed: int, epoch: int = 0) -> np.ndarray:
    start = epoch * num_sequences
    return SequenceOrder(num_sequences, seed)(np.arange(start, start + num_sequences))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 5))
def test_each_epoch_visits_every_sequence_once(num_sequences, seed, epoch):
    order = epoch_of(num_sequences, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_sequences))


def test_order_is_the_same_on_every_machine():
    # Noted once; a change would silently give resumed runs other data.
    assert epoch_of(10, seed=7).tolist() == [6, 7, 4, 0, 1, 3, 2, 5, 9, 8]


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(epoch_of(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_positions_may_span_epochs():
    order = SequenceOrder(10, seed=3)
    together = order(np.arange(5, 25))
    apart = np.concatenate([epoch_of(10, 3, epoch) for epoch in range(3)])[5:25]
    np.testing.assert_array_equal(together, apart)


def test_every_sequence_is_equally_likely_at_every_place():
    size, draws = 10, 4000
    orders = SequenceOrder(size, seed=0)(np.arange(draws * size)).reshape(draws, size)
    counts = np.stack([(orders == sequence).sum(axis=0) for sequence in range(size)])
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # (size - 1)^2 degrees of freedom, since rows and columns have fixed sums; variance twice that.
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("distance", [1, -1, 2])
def test_neighbours_are_torn_apart(distance):
    order = epoch_of(100_000, seed=0)
    # About one pair is expected to keep its distance; Poisson(1) exceeds 10 once in 1e8 times.
    assert np.count_nonzero(np.diff(order) == distance) <= 10


def test_order_of_c4_needs_no_table():
    num_sequences = 76_000_000
    order = SequenceOrder(num_sequences, seed=1)(np.arange(50_000))
    assert len(np.unique(order)) == 50_000
    assert order.min() >= 0
    assert order.max() < num_sequences
    # The mean of a uniform draw, within five standard errors.
    tolerance = 5 * num_sequences / np.sqrt(12 * 50_000)
    assert abs(order.mean() - num_sequences / 2) < tolerance
