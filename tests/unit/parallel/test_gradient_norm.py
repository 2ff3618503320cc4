"""The global norm of gradients, which the record shows and clipping uses."""

import pytest
import torch

from gns_pretrain.parallel.collectives import clip_gradient_norm, global_norm


def test_norm_counts_small_coordinates_behind_large_ones():
    gradient = torch.full((4096, 1024), 1e-5)  # as an embedding's: few tokens have most of it
    gradient[0] = 0.02
    exact = gradient.double().norm().item()
    assert global_norm([gradient]).item() == pytest.approx(exact, rel=1e-6)


def test_norm_is_over_all_tensors_together():
    norm = global_norm([torch.full((2, 2), 1.0), torch.tensor([2.0, 2.0, 2.0])])
    assert norm.dtype == torch.float32
    assert norm.item() == 4.0
    assert global_norm([]).item() == 0.0


def test_gradients_are_scaled_to_the_norm_that_is_allowed():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradient_norm(weights, None).item() == 5.0
    assert clip_gradient_norm(weights, 1.0).item() == 5.0
    assert global_norm([w.grad for w in weights]).item() == pytest.approx(1.0, rel=1e-5)
