"""Half-lives in tokens stay when the batch grows."""

import math
from typing import Any

import pytest
import torch

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.base import (
    keep_token_half_life,
    tied_beta,
    update_half_life,
)
from gns_pretrain.optim.sgd import SGD
from gns_pretrain.optim.spectral import MuonSettings
from tests.settings import odd_model


def resized(growth: float, *, momentum: float, lr_multiplier: float = 1.0) -> dict[str, Any]:
    """The group of an optimizer with decay 0.1 after the batch went from 8 to 8 * growth."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.1}]
    optimizer = SGD(groups, lr=1.0, momentum=momentum)
    keep_token_half_life(optimizer, 8)
    update_half_life(optimizer, round(8 * growth), lr_multiplier=lr_multiplier)
    return optimizer.param_groups[0]


@pytest.mark.parametrize("growth", [0.5, 1.0, 3.0])
def test_average_forgets_half_after_the_same_number_of_sequences(growth):
    # At B_0 = 8 and beta = 0.9 half is forgotten after 8 ln 2 / -ln 0.9 = 52.6 sequences.
    beta = resized(growth, momentum=0.9)["momentum"]
    assert 8 * growth * math.log(2) / -math.log(beta) == pytest.approx(52.6, abs=0.05)


@pytest.mark.parametrize(
    ("beta2", "growth", "bounded"),
    [
        (0.95, 32.0, 0.9),  # 0.95^32 = 0.19 averages over a step and a quarter
        (0.999, 32.0, 0.999**32),
        (0.8, 2.0, 0.8),  # below the floor: it stays
        (0.95, 1 / 1024, 0.9999),
        (0.99999, 0.5, 0.99999),  # above the ceiling: it stays
        (0.95, 1.0, 0.95),
    ],
)
def test_second_moments_coefficient_keeps_a_floor_and_a_ceiling(beta2, growth, bounded):
    assert tied_beta(beta2, growth, low=0.9, high=0.9999) == bounded
    assert tied_beta(beta2, growth) == beta2**growth


def test_bounds_are_of_the_second_moment_alone():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    keep_token_half_life(optimizer, 16, beta2=(0.9, 0.9999))
    update_half_life(optimizer, 512)
    assert optimizer.param_groups[0]["betas"] == (0.9**32, 0.9)


def test_average_over_one_step_stays_one():
    assert resized(4.0, momentum=0.0)["momentum"] == 0.0


def test_decay_times_rate_grows_as_the_batch():
    # Four times the batch: with lr x 2 the decay doubles, with lr x 1 it is four times as large.
    for multiplier, decay in ((2.0, 0.2), (1.0, 0.4)):
        group = resized(4.0, lr_multiplier=multiplier, momentum=0.9)
        assert group["weight_decay"] == pytest.approx(decay)


def muon() -> torch.optim.Optimizer:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return MuonSettings(momentum=0.9, weight_decay=0.1).build(model)


def test_tied_groups_follow_the_batch_there_and_back():
    optimizer = muon()
    keep_token_half_life(optimizer, 16)
    matrices, rest, norms = optimizer.param_groups
    update_half_life(optimizer, 32, lr_multiplier=math.sqrt(2))
    assert matrices["momentum"] == pytest.approx(0.81)
    assert rest["betas"] == pytest.approx((0.81, 0.9025))
    assert matrices["weight_decay"] == pytest.approx(0.1 * math.sqrt(2))
    assert norms["weight_decay"] == 0.0
    update_half_life(optimizer, 16)
    assert (matrices["momentum"], rest["betas"]) == (0.9, (0.9, 0.95))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_is_a_sum_settles_at_the_same_length_whatever_the_batch(nesterov):
    # m = 0.9 m + g settles at 10 g; with beta = 0.9^4 alone it would settle at 2.9 g.
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [weight]}], lr=1.0, momentum=0.9, nesterov=nesterov)
    keep_token_half_life(optimizer, 16)

    def moved_by_a_step() -> float:
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        return before - weight.item()

    lengths = []
    for batch_size, steps in ((16, 300), (64, 1), (64, 100)):
        update_half_life(optimizer, batch_size)
        lengths.append([moved_by_a_step() for _ in range(steps)][-1])
    assert lengths == pytest.approx([10.0, 10.0, 10.0], rel=1e-3)


def test_tied_sum_at_its_first_batch_size_takes_the_very_steps_of_an_untied_one():
    ends = []
    for tied in (False, True):
        weight = torch.nn.Parameter(torch.zeros(7))
        optimizer = SGD([{"params": [weight]}], lr=0.1, momentum=0.9, nesterov=True)
        if tied:
            keep_token_half_life(optimizer, 16)
            update_half_life(optimizer, 16)
        for step in range(5):
            weight.grad = torch.arange(7.0) / (step + 3)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_matrix_rule_weighs_gradients_as_the_tied_sum_does():
    optimizer = muon()
    keep_token_half_life(optimizer, 16)
    update_half_life(optimizer, 32)
    (matrices, *_), rule = optimizer.param_groups, optimizer.optimizers[0]
    for matrix in matrices["params"]:
        matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    # gain (1 - 0.81) / (1 - 0.9) = 1.9 on the first gradient of ones.
    momentum = rule.state[matrices["params"][0]]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.full_like(momentum, 1.9))


def test_untied_groups_stay_as_they_are():
    optimizer = muon()
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    update_half_life(optimizer, 999)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == before
