import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_pretrain.parallel.matrix_ownership import balanced_owners, neighbouring_owners


def test_costliest_matrices_go_to_different_ranks():
    assert balanced_owners([1.0, 8.0, 8.0, 1.0], 2) == [0, 0, 1, 1]


def test_neighbours_have_one_owner_and_first_ranks_are_filled_first():
    # Two blocks of heavy and light matrices: at most three heavy ones a rank.
    block = [8.0, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0]
    assert neighbouring_owners(2 * block, 4) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert neighbouring_owners([8.0, 8.0], 4) == [0, 1]
    assert neighbouring_owners([], 4) == []


@pytest.mark.parametrize("assign", [balanced_owners, neighbouring_owners])
@given(
    costs=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=40),
    num_ranks=st.integers(1, 8),
)
def test_no_rank_has_more_than_the_mean_and_one_matrix(assign, costs, num_ranks):
    owners = assign(costs, num_ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(num_ranks)]
    assert max(loads) <= sum(costs) / num_ranks + max(costs) + 1e-9
    assert sum(loads) == pytest.approx(sum(costs))
