import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_pretrain.parallel.matrix_ownership import balanced_owners


def test_costliest_matrices_go_to_different_ranks():
    assert balanced_owners([1.0, 8.0, 8.0, 1.0], 2) == [0, 0, 1, 1]


@given(
    costs=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=40),
    num_ranks=st.integers(1, 8),
)
def test_no_rank_has_more_than_the_mean_and_one_matrix(costs, num_ranks):
    owners = balanced_owners(costs, num_ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(num_ranks)]
    assert max(loads) <= sum(costs) / num_ranks + max(costs) + 1e-9
    assert sum(loads) == pytest.approx(sum(costs))
