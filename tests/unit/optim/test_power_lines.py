"""Batch size and weight decay by rules of scale."""

import math

import pytest
import torch

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.base import (
    keep_token_half_life,
    remember_peaks,
    set_timescale,
    update_half_life,
)
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.power_lines import (
    batch_size_by_rule,
    optimal_batch_size,
    optimal_timescale,
    timescale_by_rule,
    weight_decay_of,
)
from gns_pretrain.optim.sgd import SGD
from gns_pretrain.optim.spectral import MuonSettings
from tests.settings import odd_model


def test_laws_by_hand():
    # 0.0306 x (3e9)^0.383 = 0.0306 x e^(0.383 x 21.8219) = 130.45 sequences of 2,048 tokens.
    assert optimal_batch_size(3e9) == pytest.approx(130.45 * 2048, rel=1e-4)
    # 1.084 x 20^-0.527 = 1.084 x e^(-0.527 x 2.99573)
    assert optimal_timescale(20) == pytest.approx(0.2235, abs=1e-4)


@pytest.mark.parametrize(
    ("tokens", "length", "sequences"),
    # The paper's "160M" and "1B" train at 64 to 256: the law's 133.7 and 279.8 lie within.
    [(3_200_122_880, 2048, 128), (22_000_000_000, 2048, 256), (3_200_122_880, 1024, 256)],
)
def test_batch_is_the_nearest_power_of_two_of_sequences(tokens, length, sequences):
    assert batch_size_by_rule(tokens, length) == sequences


@pytest.mark.parametrize("tokens", [1e6, 1e12])
def test_budget_far_outside_the_fitted_range_is_refused_with_what_the_law_would_give(tokens):
    with pytest.raises(InputError, match=r"2.2 to 142 billion tokens.*: batch_size.initial=\d+\)"):
        batch_size_by_rule(int(tokens), 2048)


@pytest.mark.parametrize("tokens_per_parameter", [9.9, 2561])
def test_run_far_outside_the_fitted_tokens_a_parameter_is_refused(tokens_per_parameter):
    with pytest.raises(InputError, match=r"20 to 1280 .* optimizer.weight_decay_timescale=0.\d+\)"):
        timescale_by_rule(tokens_per_parameter)
    assert timescale_by_rule(14) == optimal_timescale(14)


def test_weight_forgets_all_but_1_in_e_within_its_timescale():
    # 1,000 steps of rate 0.01 that average over a fifth of them: lambda = 1 / (0.2 x 0.01 x 1000).
    decay = weight_decay_of(0.2, lr=0.01, steps=1000)
    assert decay == pytest.approx(0.5)
    assert (1 - 0.01 * decay) ** 200 == pytest.approx(math.exp(-1), rel=5e-3)


def test_timescale_below_a_step_is_refused():
    settings = AdamWSettings(weight_decay_timescale="0.002")
    assert settings.timescale(steps=500, tokens_per_parameter=lambda: 0.0) == 0.002
    with pytest.raises(InputError, match=r"=0.002 of 400 steps is less than one .* least 0.0025"):
        settings.timescale(steps=400, tokens_per_parameter=lambda: 0.0)


def test_every_decayed_group_has_the_timescale_at_its_own_learning_rate():
    model = Llama(odd_model())
    settings = MuonSettings(lr=0.05, adamw=AdamWPart(lr=0.002), weight_decay_timescale="0.25")
    optimizer = settings.decaying().build(model)
    remember_peaks(optimizer)
    set_timescale(optimizer, 0.25, steps=400)
    matrices, others, norms = optimizer.param_groups
    # 1 / (eta lambda) = 100 steps
    assert matrices["weight_decay"] == pytest.approx(0.2)
    assert others["weight_decay"] == pytest.approx(5.0)
    assert norms["weight_decay"] == 0.0


def test_timescale_stays_in_tokens_as_the_batch_grows_and_averages_stay_in_steps():
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 1.0}]
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    remember_peaks(optimizer)
    set_timescale(optimizer, 0.25, steps=400)
    keep_token_half_life(optimizer, 8, tied=("weight_decay",))
    (group,) = optimizer.param_groups
    for batch_size, multiplier in ((8, 1.0), (32, 2.0), (256, math.sqrt(32)), (32, 1.0)):
        update_half_life(optimizer, batch_size, lr_multiplier=multiplier)
        timescale = batch_size / (0.1 * multiplier * group["weight_decay"])  # sequences
        assert timescale == pytest.approx(0.25 * 400 * 8)
        assert group["momentum"] == 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamWSettings(weight_decay_timescale="0"), "must be a positive number or auto"),
        (lambda: AdamWSettings(weight_decay_timescale="nan"), "must be a positive number or auto"),
        (lambda: AdamWSettings(weight_decay_timescale="none"), "must be a positive number or"),
        (
            lambda: AdamWSettings(weight_decay=0.3, weight_decay_timescale="auto"),
            r"optimizer\.weight_decay=0\.3 and .*timescale=auto both say how weights decay",
        ),
        (
            lambda: MuonSettings(adamw=AdamWPart(weight_decay=0.3), weight_decay_timescale="0.2"),
            r"use optimizer\.adamw\.weight_decay=0, or a timescale of null",
        ),
        (
            lambda: CustomSettings(class_path="torch.optim.Adam", weight_decay_timescale="0.2"),
            r"torch\.optim\.Adam may couple its own with the gradient",
        ),
        (lambda: AdamWSettings(tied_beta2=[0.9]), "must be two numbers from 0 to 1, in order"),
        (lambda: AdamWSettings(tied_beta2=[0.99, 0.9]), "must be two numbers from 0 to 1"),
    ],
)
def test_mistake_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
