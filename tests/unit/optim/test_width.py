"""muP: one table of initial weights and learning rates; steps move outputs alike at any width."""

from dataclasses import replace

import pytest
import torch

from gns_pretrain.config.checks import check_parametrization
from gns_pretrain.errors import InputError
from gns_pretrain.launch.coordinate_check import CoordinateCheckRequest, coordinate_check
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adago import AdaGOSettings
from gns_pretrain.optim.adagrad_norm import AdaGradNormSettings
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings, SpecSGDSettings
from gns_pretrain.optim.subset_norm import SubsetNormSettings
from gns_pretrain.optim.width import scale_learning_rates
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, load_model
from tests.runs import train_here
from tests.settings import odd_model, small_run, without_times

PART = AdamWPart(lr=2e-3)
RULES = {
    "sgd": SGDSettings(lr=0.2),
    "sgd_momentum": SGDSettings(lr=0.1, momentum=0.9),
    "signsgd": SignumSettings(lr=2e-3, momentum=0.0),
    "signum": SignumSettings(lr=2e-3),
    "adamw": AdamWSettings(lr=2e-3),
    "specsgd": SpecSGDSettings(lr=2e-2, adamw=PART),
    "muon": MuonSettings(lr=2e-2, adamw=PART),
    "muon_spectral": MuonSettings(lr=2e-2, scaling="spectral", adamw=PART),
    "muon_match_rms": MuonSettings(lr=1e-2, scaling="match_rms_adamw", adamw=PART),
    "adago": AdaGOSettings(lr=2e-2, adamw=PART),
    "subset_norm": SubsetNormSettings(lr=1e-2, adamw=PART),
}
# Learning rates of embedding, block matrices, output and norms over the settings', at 4 times the
# width, by hand; a matrix rule's own is beside its AdamW's.
FACTORS = {
    "sgd": (4, 1, 1 / 4, 4),
    "sgd_momentum": (4, 1, 1 / 4, 4),
    "signsgd": (1, 1 / 4, 1 / 4, 1),
    "signum": (1, 1 / 4, 1 / 4, 1),
    "adamw": (1, 1 / 4, 1 / 4, 1),
    "specsgd": (1, 1, 1 / 4, 1),
    "muon": (1, 1, 1 / 4, 1),
    "muon_spectral": (1, 1, 1 / 4, 1),
    "muon_match_rms": (1, 1 / 2, 1 / 4, 1),
    "adago": (1, 1, 1 / 4, 1),
    "subset_norm": (1, 1 / 2, 1 / 4, 1),
}
KINDS = ("embedding.weight", "layers.0.feed_forward.w2.weight", "output.weight", "norm.weight")


def wide_model(dim=64, **changes):
    """A Llama of one block whose shape may be widened."""
    shape = {"dim": dim, "num_layers": 1, "num_heads": dim // 16, "num_kv_heads": dim // 16}
    return odd_model(**(shape | {"ffn_dim": 2 * dim} | changes))


def initialized(config):
    model = Llama(config)
    model.init_weights(seed=0)
    return model


def group_of(optimizer, parameter):
    """The one group that has a parameter."""
    (found,) = (
        group
        for group in optimizer.param_groups
        if any(parameter is each for each in group["params"])
    )
    return found


@pytest.mark.parametrize("rule", RULES)
def test_rates_are_those_of_the_table_and_the_decay_of_a_step_stays(rule):
    model = initialized(wide_model())
    before, after = RULES[rule].build(model), RULES[rule].build(model)
    after = scale_learning_rates(after, model, 4.0)
    parameters = dict(model.named_parameters())
    for name, factor in zip(KINDS, FACTORS[rule], strict=True):
        old, new = (group_of(each, parameters[name]) for each in (before, after))
        assert new["lr"] == pytest.approx(factor * old["lr"]), name
        assert new["lr"] * new["weight_decay"] == pytest.approx(old["lr"] * old["weight_decay"])
    assert sum(len(group["params"]) for group in after.param_groups) == len(parameters)
    # What a record shows is the setting, unless all that its rule takes has another rate.
    if rule not in ("muon_match_rms", "subset_norm"):
        assert after.param_groups[0]["lr"] == RULES[rule].lr


def test_first_weights_follow_the_width_and_at_the_base_all_is_as_ever():
    standard = initialized(wide_model(256))
    for name, weight in initialized(wide_model(256, parametrization="mup")).named_parameters():
        old = standard.get_parameter(name)
        factor = 1.0 if name.endswith(("embedding.weight", "norm.weight")) else 0.5
        torch.testing.assert_close(weight, factor * old, rtol=1e-6, atol=0)
    standard = initialized(wide_model(64))
    at_base = initialized(wide_model(64, parametrization="mup"))
    assert all(map(torch.equal, standard.parameters(), at_base.parameters()))
    optimizer = RULES["adamw"].build(at_base)
    assert scale_learning_rates(optimizer, at_base, at_base.config.relative_width) is optimizer


def test_model_is_an_ordinary_llama():
    standard, other = (initialized(wide_model(128, parametrization=p)) for p in ("standard", "mup"))
    standard.load_state_dict(other.state_dict())
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(standard(tokens), other(tokens))


@pytest.mark.parametrize("rule", ["adamw", "muon_match_rms"])
def test_stopped_run_goes_on_bit_for_bit(rule, tmp_path, shards):
    model = wide_model(parametrization="mup", mup_base_dim=16)
    config = small_run(tmp_path, shards, steps=6, model=model, optimizer=RULES[rule])
    whole = replace(config, run_name="whole")
    assert train_here(whole) == 0
    assert [train_here(config, stop_after=steps) for steps in (4, None)] == [75, 0]
    lines = [
        [without_times(line) for line in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("small", "whole")
    ]
    assert lines[0] == lines[1]
    assert load_model(checkpoint_folders(tmp_path / "small" / "checkpoints")[0]).config == model


@pytest.mark.parametrize("rule", RULES)
def test_one_step_moves_outputs_alike_at_any_width_and_without_it_does_not(rule, tmp_path, shards):
    config = small_run(tmp_path, shards, optimizer=RULES[rule], gradient_clip=None)
    exponents = {}
    for parametrization, widths in {"mup": [64, 512], "standard": [64, 256]}.items():
        model = wide_model(parametrization=parametrization)
        request = CoordinateCheckRequest(widths=widths, steps=1)
        changes = coordinate_check(replace(config, model=model), request)
        exponents[parametrization] = {each.layer: each.exponent for each in changes}
        assert all(rms > 0 for each in changes for rms in each.rms)
    # Exact in the limit of wide models: the narrowest are off by powers of 0.25 (seen).
    assert all(abs(p) < 0.3 for p in exponents["mup"].values()), exponents
    assert exponents["standard"]["feed_forward"] > 0.8, exponents
    assert exponents["standard"]["logits"] > 0.4, exponents


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"optimizer": SGDSettings(lr=0.1, normalize=True)}, "no learning rates for SGD"),
        ({"optimizer": AdaGradNormSettings()}, "no learning rates for AdaGradNorm"),
        ({"optimizer": CustomSettings(class_path="torch.optim.Adagrad")}, "rates for Adagrad"),
        ({"optimizer": SGDSettings(lr=0.1), "gradient_clip": 1.0}, "use gradient_clip=null"),
    ],
)
def test_what_has_no_rule_is_refused(changes, rule, tmp_path, shards):
    config = small_run(tmp_path, shards, model=wide_model(128, parametrization="mup"))
    check_parametrization(config)
    with pytest.raises(InputError, match=rule):
        check_parametrization(replace(config, **changes))


def test_tied_matrix_and_odd_widths_are_refused():
    with pytest.raises(InputError, match=r"use model\.tie_embeddings=false"):
        wide_model(parametrization="mup", tie_embeddings=True)
    with pytest.raises(InputError, match=r"model.num_heads=6.25; use a multiple of 16"):
        wide_model().of_width(100)
    with pytest.raises(InputError, match="give two or more"):
        CoordinateCheckRequest(widths=[64])
