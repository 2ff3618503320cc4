"""One rank's sums: how much memory their totals take, and what leaving samples out leaves."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gns_pretrain.noise_scale import geometries as module
from gns_pretrain.noise_scale import sample_sums
from gns_pretrain.noise_scale.geometries import Euclidean, Manhattan, Nuclear
from gns_pretrain.noise_scale.sample_sums import SampleSums
from gns_pretrain.noise_scale.settings import NoiseScaleSettings

MATRICES, ROWS, COLUMNS = 24, 16, 20


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made in the block held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def sums_of_matrices() -> SampleSums:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, MATRICES, ROWS, COLUMNS, generator=generator)
    wide = samples.double()
    signed = samples[0::2].sum(0) - samples[1::2].sum(0)
    return SampleSums(
        num_even=2,
        num_odd=2,
        square_norms=wide.square().sum((0, 2, 3)),
        means=[],
        squares=[],
        signed=[],
        grams=dict(enumerate((wide @ wide.mT).sum(0))),
        matrices=dict(enumerate(samples.mean(0))),
        signed_matrices=dict(enumerate(signed)),
    )


def totals_of(sums: SampleSums, *, batch_size: int, square_root: str) -> torch.Tensor:
    return Nuclear(NoiseScaleSettings(square_root=square_root)).totals(sums, batch_size)


def test_roots_of_many_matrices_take_the_memory_of_a_chunk(monkeypatch):
    sums = sums_of_matrices()
    together = totals_of(sums, batch_size=4, square_root="exact")
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 2 * ROWS**2)
    with PeakBytes() as peak:
        apart = totals_of(sums, batch_size=4, square_root="exact")
    torch.testing.assert_close(apart, together)
    chunk = 8 * module.CHUNK_ENTRIES
    # Eight of a chunk, and the small ones; taken together they were eight of all the owned Grams.
    assert peak.peak < 9 * chunk


def test_leaving_out_a_whole_half_leaves_nothing_cross_fitted():
    sums = sums_of_matrices()
    odd = SampleSums(
        0, 2, torch.zeros(MATRICES), [], [], [], sums.grams, sums.matrices, sums.signed_matrices
    )
    left = sums.without(odd)
    assert (left.num_even, left.num_odd) == (2, 0)
    assert (left.signed, left.signed_matrices) == ([], {})
    totals = totals_of(left, batch_size=2, square_root="exact")
    assert not totals[:, Nuclear.columns.index("gain")].any()


def test_square_roots_that_took_eigenvalues_are_counted_once():
    sums = sums_of_matrices()
    # A mean Gram below the Gram of the mean has negative eigenvalues: the iteration refuses.
    for i in (3, 4):
        sums.grams[i] = 0.5 * sums.grams[i]
    totals = totals_of(sums, batch_size=4, square_root="iterative")
    assert totals[:, Nuclear.columns.index("fallbacks")].sum() == 2


def sums_of_rows() -> SampleSums:
    """Weights of three sizes, one of them with rows on another rank alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (50,), (0, 4), (20, 7), (2,)]
    samples = [torch.randn(4, *size, generator=generator) for size in sizes]
    return SampleSums(
        num_even=2,
        num_odd=2,
        square_norms=torch.stack([each.double().square().sum() for each in samples]),
        means=[each.mean(0) for each in samples],
        squares=[each.square().sum(0) for each in samples],
        signed=[each[0::2].sum(0) - each[1::2].sum(0) for each in samples],
        grams={},
        matrices={},
        signed_matrices={},
    )


@pytest.mark.parametrize("geometry", [Euclidean, Manhattan])
def test_totals_of_weights_do_not_depend_on_which_are_read_together(monkeypatch, geometry):
    sums = sums_of_rows()
    whole = geometry(NoiseScaleSettings()).totals(sums, batch_size=4)
    for entries in (1, 60, 200):
        monkeypatch.setattr(sample_sums, "ROW_ENTRIES", entries)
        torch.testing.assert_close(
            geometry(NoiseScaleSettings()).totals(sums, batch_size=4), whole, rtol=1e-14, atol=1e-14
        )
    monkeypatch.setattr(sample_sums, "ROW_ENTRIES", 60)
    assert [(rows.start, rows.stop) for rows in sums.row_groups()] == [
        (0, 1),
        (1, 3),
        (3, 4),
        (4, 5),
    ]


@pytest.mark.parametrize("entries", [1, ROWS**2, 5 * ROWS**2])
def test_every_matrix_is_in_one_chunk_of_its_size(monkeypatch, entries):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)
    grams = {i: torch.zeros(ROWS if i % 3 else 2, ROWS if i % 3 else 2) for i in range(10)}
    chunks = list(module.chunks_of_one_size(grams))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(10))
    for chunk in chunks:
        size = len(grams[chunk[0]])
        assert {len(grams[i]) for i in chunk} == {size}
        assert len(chunk) == 1 or len(chunk) * size**2 <= entries
