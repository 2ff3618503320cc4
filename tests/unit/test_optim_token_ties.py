"""Half-lives in tokens stay when the batch grows."""

import math

import pytest
import torch

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.muon import MuonSettings, build_muon
from gns_pretrain.optim.token_ties import retie, tie_to_tokens, tied_average, tied_weight_decay
from tests.settings import odd_model


@pytest.mark.parametrize("growth", [0.5, 1.0, 3.0])
def test_average_forgets_half_after_the_same_number_of_sequences(growth):
    # At B_0 = 8 and beta = 0.9 half is forgotten after 8 ln 2 / -ln 0.9 = 52.6 sequences.
    beta = tied_average(0.9, growth)
    assert 8 * growth * math.log(2) / -math.log(beta) == pytest.approx(52.6, abs=0.05)


def test_average_over_one_step_stays_one():
    assert tied_average(0.0, 4.0) == 0.0


def test_decay_times_rate_grows_as_the_batch():
    # Four times the batch: with lr x 2 the decay doubles, with lr x 1 it is four times as large.
    assert tied_weight_decay(0.1, 4.0, 2.0) == pytest.approx(0.2)
    assert tied_weight_decay(0.1, 4.0, 1.0) == pytest.approx(0.4)


def muon() -> torch.optim.Optimizer:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return build_muon(model, MuonSettings(momentum=0.9, weight_decay=0.1))


def test_tied_groups_follow_the_batch_there_and_back():
    optimizer = muon()
    tie_to_tokens(optimizer, 16)
    matrices, rest, norms = optimizer.param_groups
    retie(optimizer, 32, lr_multiplier=math.sqrt(2))
    assert matrices["momentum"] == pytest.approx(0.81)
    assert rest["betas"] == pytest.approx((0.81, 0.9025))
    assert matrices["weight_decay"] == pytest.approx(0.1 * math.sqrt(2))
    assert norms["weight_decay"] == 0.0
    retie(optimizer, 16)
    assert (matrices["momentum"], rest["betas"]) == (0.9, (0.9, 0.95))


def test_untied_groups_stay_as_they_are():
    optimizer = muon()
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    retie(optimizer, 999)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == before
