"""Which parameter belongs to which rule, and how learning rates move together."""

from torch import nn

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.base import decay_groups, remember_peaks, set_learning_rate
from gns_pretrain.optim.combined import split_parameters
from gns_pretrain.optim.spectral import MuonSettings
from tests.settings import odd_model


def llama(**changes) -> Llama:
    model = Llama(odd_model(**changes))
    model.init_weights(seed=0)
    return model


def test_role_counts_and_not_shape():
    # dim = vocabulary: embedding, output and wq have one shape; only wq is a block matrix.
    model = llama(dim=24, vocab_size=24, num_kv_heads=3)
    assert model.embedding.weight.shape == model.layers[0].attention.wq.weight.shape
    (matrices,), _ = split_parameters(model)
    chosen = {id(weight) for weight in matrices["params"]}
    assert id(model.layers[0].attention.wq.weight) in chosen
    assert id(model.embedding.weight) not in chosen
    assert id(model.output.weight) not in chosen
    assert len(chosen) == 2 * 7


def test_roles_of_the_two_parts_leave_nobody_out():
    model = llama()
    (matrices,), others = split_parameters(model)
    rest = decay_groups(others, weight_decay=0.1, matrices_only=True)
    parts = [p for group in [matrices, *rest] for p in group["params"]]
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


def test_parameters_added_to_a_block_find_their_part_by_shape():
    model = llama()
    model.layers[1].gate = nn.Linear(4, 2)
    (matrices,), others = split_parameters(model)
    assert any(parameter is model.layers[1].gate.weight for parameter in matrices["params"])
    assert any(parameter is model.layers[1].gate.bias for parameter in others)
    undecayed = decay_groups(others, weight_decay=0.1, matrices_only=True)[1]["params"]
    assert any(parameter is model.layers[1].gate.bias for parameter in undecayed)


def test_learning_rates_of_both_parts_scale_by_the_same_factor():
    settings = MuonSettings(lr=0.2)
    settings.adamw.lr = 0.03
    optimizer = settings.build(llama())
    remember_peaks(optimizer)
    for factor in (0.25, 1.5):
        assert set_learning_rate(optimizer, factor) == 0.2 * factor
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.2 * factor, 0.03 * factor, 0.03 * factor]
