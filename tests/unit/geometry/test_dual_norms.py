"""Dual norms by hand, and as the gain of a step along the steepest-descent direction."""

import pytest
import torch

from gns_pretrain.geometry import directions
from tests import dual_norms


def test_norms_by_hand() -> None:
    # Singular values 3 and 4; coordinates 3, 0, 0, -4.
    gradient = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert dual_norms.euclidean(gradient) == 5.0
    assert dual_norms.manhattan(gradient) == 7.0
    assert dual_norms.nuclear(gradient).item() == pytest.approx(7.0, rel=1e-14)


def test_nuclear_norm_of_a_rank_one_matrix_is_its_euclidean_norm() -> None:
    # All ones, 2 by 8: one singular value, sqrt(2 * 8) = 4; the Manhattan norm is 16.
    gradient = torch.ones(2, 8)
    assert dual_norms.nuclear(gradient).item() == pytest.approx(4.0, rel=1e-14)
    assert dual_norms.manhattan(gradient) == 16.0


def test_a_list_counts_as_one_gradient() -> None:
    first, second = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert dual_norms.euclidean([first, second]) == 5.0  # one vector (3, 4)
    assert dual_norms.manhattan([first, second]) == 7.0
    assert dual_norms.nuclear([first, second]) == 7.0  # layer by layer


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_step_along_each_direction_gains_its_dual_norm(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction, norm in (
        (torch.sign, dual_norms.manhattan),
        (directions.matrix_sign, dual_norms.nuclear),
    ):
        gain = (gradient * direction(gradient)).sum()
        assert gain.item() == pytest.approx(norm(gradient).item(), rel=1e-12)
