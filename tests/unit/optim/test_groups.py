"""Which parameter belongs to which rule, and how learning rates move together."""

import pytest
import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Kind, Llama
from gns_pretrain.optim.base import (
    BLOCK_MATRICES,
    block_matrices,
    decay_groups,
    remember_peaks,
    set_learning_rate,
)
from gns_pretrain.optim.spectral import MuonSettings
from tests.settings import odd_model


def llama(**changes) -> Llama:
    model = Llama(odd_model(**changes))
    model.init_weights(seed=0)
    return model


def test_kind_counts_and_not_shape():
    # dim = vocabulary: embedding, output and wq have one shape; only wq is a block matrix.
    model = llama(dim=24, vocab_size=24, num_kv_heads=3)
    assert model.embedding.weight.shape == model.layers[0].attention.wq.weight.shape
    chosen = {id(weight) for weight in block_matrices(model)}
    assert id(model.layers[0].attention.wq.weight) in chosen
    assert id(model.embedding.weight) not in chosen
    assert id(model.output.weight) not in chosen
    assert len(chosen) == 2 * 7


def test_kinds_of_the_two_parts_leave_nobody_out():
    model = llama()
    rest = decay_groups(
        model, weight_decay=0.1, matrices_only=True, kinds=set(Kind) - BLOCK_MATRICES
    )
    parts = [p for group in rest for p in group["params"]] + block_matrices(model)
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))


def test_tied_embedding_is_with_adamw_once():
    model = llama(tie_embeddings=True)
    optimizer = MuonSettings().build(model)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_in_no_group():
    model = llama()
    model.layers[0].attention.wq.weight.requires_grad_(False)
    model.embedding.weight.requires_grad_(False)
    grouped = {id(p) for g in MuonSettings().build(model).param_groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("choose", [lambda m: MuonSettings().build(m), block_matrices])
def test_unknown_parameter_is_an_error_that_names_it(choose):
    model = llama()
    model.layers[1].gate = nn.Linear(2, 2, bias=False)
    with pytest.raises(InputError, match=r"layers\.1\.gate\.weight is of no known kind"):
        choose(model)


def test_bias_inside_a_block_is_an_error_that_names_it():
    model = llama()
    model.layers[0].attention.wq.bias = nn.Parameter(torch.zeros(18))
    with pytest.raises(InputError, match=r"layers\.0\.attention\.wq\.bias has shape \[18\]"):
        block_matrices(model)


def test_learning_rates_of_both_parts_scale_by_the_same_factor():
    settings = MuonSettings(lr=0.2)
    settings.adamw.lr = 0.03
    optimizer = settings.build(llama())
    remember_peaks(optimizer)
    for factor in (0.25, 1.5):
        assert set_learning_rate(optimizer, factor) == 0.2 * factor
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.2 * factor, 0.03 * factor, 0.03 * factor]
