"""Norms over many coordinates: as exact as in float64, without a float64 copy."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gns_pretrain.geometry import norms as module
from gns_pretrain.geometry.norms import norms


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_norms_are_those_of_float64(monkeypatch, order):
    monkeypatch.setattr(module, "_PIECE_ENTRIES", 100)
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 33), (0, 5), (100,), (40, 20)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(tensors[0].T)
    expected = [torch.linalg.vector_norm(t.double(), order) for t in tensors]
    torch.testing.assert_close(norms(tensors, order), torch.stack(expected), rtol=1e-15, atol=0)


def largest_allocation(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    return max(event.self_cpu_memory_usage for event in profiled.events())


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_norm_of_a_large_tensor_writes_no_float64_copy_of_it(order):
    tensor = torch.ones(2**21)
    assert largest_allocation(lambda: norms([tensor], order)) <= 8 * module._PIECE_ENTRIES
    # What the profiler shows where torch adds up in float64 by itself.
    copy = largest_allocation(lambda: tensor.sum(dtype=torch.float64))
    assert copy >= 8 * tensor.numel()
