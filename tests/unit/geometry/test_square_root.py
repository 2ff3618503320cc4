"""Traces of square roots: the iteration against known spectra, its proofs and its fallbacks."""

import pytest
import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import (
    TOLERANCE,
    default_mode,
    smaller_side_gram,
    trace_square_root,
)
from tests import dual_norms

WIDTH = 192


def spectra(width: int) -> dict[str, Tensor]:
    """Singular values; as eigenvalues of a Gram their squares, down to i^-4."""
    index = torch.arange(1, width + 1, dtype=torch.float64)
    half = (index <= width // 2).double()
    return {
        "flat": torch.ones(width, dtype=torch.float64),
        "1/sqrt(i)": index**-0.5,
        "1/i": index**-1.0,
        "1/i^2": index**-2.0,
        "rank 1": (index == 1).double(),
        "half rank, flat": half,
        "half rank, 1/i^2": half * index**-2.0,
        "rank 1 above the resolution": torch.where(index == 1, 1.0, 3e-7),
    }


def basis(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("mode", ["iterative", "exact"])
def test_traces_of_known_spectra_are_within_tolerance(mode: str) -> None:
    values = torch.stack(list(spectra(WIDTH).values()))
    vectors = basis(WIDTH)
    grams = 7e-9 * (vectors * values.square().unsqueeze(-2)) @ vectors.mT
    result = trace_square_root(grams, mode=mode)
    assert result.num_fallbacks == 0
    truth = 7e-9**0.5 * values.sum(-1)
    # Exact: each of the zero eigenvalues is off by at most 1e-16 * WIDTH, its root by 1.4e-7.
    tolerance = TOLERANCE if mode == "iterative" else WIDTH * 1.4e-7
    assert ((result.values - truth).abs() <= tolerance * truth).all(), result.values / truth - 1


@pytest.mark.parametrize("mode", ["iterative", "exact"])
@pytest.mark.parametrize("shape", [(WIDTH, 256), (256, WIDTH)])
def test_traces_of_grams_of_float32_matrices_agree_with_singular_values(
    mode: str, shape: tuple[int, int]
) -> None:
    left, right = basis(shape[0])[:, :WIDTH], basis(shape[1], seed=1)[:, :WIDTH]
    matrices = torch.stack([left * s @ right.mT for s in spectra(WIDTH).values()]).float()
    result = trace_square_root(smaller_side_gram(matrices.double()), mode=mode)
    truth = torch.linalg.svdvals(matrices.double()).sum(-1)
    # Exact: singular values below 1e-8 of the largest are lost, each by at most that.
    tolerance = TOLERANCE if mode == "iterative" else WIDTH * 1e-8
    assert ((result.values - truth).abs() <= tolerance * truth).all(), result.values / truth - 1
    assert result.values.sum().item() == pytest.approx(
        dual_norms.nuclear(matrices).item(), rel=TOLERANCE
    )


def test_traces_by_hand() -> None:
    grams = torch.tensor([[[4.0, 0.0], [0.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]]])
    expected = [5.0, 2.0**0.5]  # 2 + 3; eigenvalues 2 and 0
    assert trace_square_root(grams, mode="exact").values.tolist() == pytest.approx(expected)
    result = trace_square_root(grams, mode="iterative").values.tolist()
    assert result == pytest.approx(expected, rel=TOLERANCE)


def test_only_what_the_iteration_cannot_prove_takes_the_exact_route() -> None:
    vectors = basis(40)
    good = vectors * torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    good = good @ vectors.mT
    negative = torch.linspace(1.0, 0.1, 40, dtype=torch.float64)
    negative[-1] = -1e-7  # what rounding leaves of a zero in float32
    bad = vectors * negative @ vectors.mT
    result = trace_square_root(torch.stack([good, bad, good]), mode="iterative")
    assert result.num_fallbacks == 1
    assert result.values[1].item() == pytest.approx(negative[:-1].sqrt().sum().item(), rel=1e-12)
    assert result.values[0] == result.values[2]


def test_a_wide_matrix_with_too_small_a_trace_is_not_called_proven() -> None:
    # Rank 1: the bound m * 1e-6 on what is not resolved exceeds the tolerance from m = 890 on.
    gram = torch.zeros(1, 1000, 1000)
    gram[0, 0, 0] = 1.0
    result = trace_square_root(gram, mode="iterative")
    assert result.num_fallbacks == 1
    assert result.values.item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("mode", ["iterative", "exact"])
def test_zero_and_not_finite_matrices_spare_their_neighbours(mode: str) -> None:
    grams = torch.eye(3).expand(4, 3, 3).clone()
    grams[0] = 0.0
    grams[1, 0, 1] = torch.nan
    grams[2, 2, 2] = torch.inf
    result = trace_square_root(grams, mode=mode)
    assert result.values[0] == 0.0
    assert result.values[1].isnan()
    assert result.values[2].isnan()
    assert result.values[3].item() == pytest.approx(3.0, rel=TOLERANCE)
    assert result.num_fallbacks == 0


@pytest.mark.parametrize("mode", ["iterative", "exact"])
def test_an_owner_of_no_matrix_gets_no_value(mode: str) -> None:
    assert trace_square_root(torch.zeros(0, 5, 5), mode=mode).values.shape == (0,)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    grams = smaller_side_gram(factors)
    whole = trace_square_root(grams, mode="iterative").values
    monkeypatch.setattr("gns_pretrain.geometry.square_root._CHUNK_ENTRIES", 72)  # two matrices
    torch.testing.assert_close(trace_square_root(grams, mode="iterative").values, whole)


def test_the_default_is_exact_on_a_cpu_and_iterative_on_a_gpu() -> None:
    assert default_mode(torch.device("cpu")) == "exact"
    assert default_mode(torch.device("cuda")) == "iterative"
    gram = basis(6)[None] @ torch.diag(torch.arange(1.0, 7.0).double()) @ basis(6).mT[None]
    assert trace_square_root(gram).values == trace_square_root(gram, mode="exact").values


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="mode=fast is unknown; use one of auto, iterative, exact"):
        trace_square_root(torch.eye(2)[None], mode="fast")
