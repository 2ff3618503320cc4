"""Muon and specSGD on one process: against the paper's formulas and torch.optim.Muon."""

import math

import pytest
import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWPart
from gns_pretrain.optim.spectral import SCALINGS, Muon, MuonSettings, SpecSGD, SpecSGDSettings
from gns_pretrain.parallel import matrix_ownership
from tests.settings import odd_model

SHAPES = [(6, 6), (9, 4), (4, 9), (6, 6), (9, 4)]
LR, DECAY = 0.1, 0.2
STEEPNESS = 3.4445**5  # of five quintic steps at zero: how much they amplify rounding
ROUNDING = STEEPNESS * 2**-23  # of a float32 update of spectral norm 1


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(
    weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4
) -> list[Tensor]:
    for step in range(steps):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


def five_quintic_steps(matrix: Tensor) -> Tensor:
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reference(*, beta: float, nesterov: bool, sign=five_quintic_steps) -> list[Tensor]:
    """The paper's Muon, matrix by matrix in float64."""
    weights = [weight.detach().double() for weight in parameters()]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(4):
        for weight, momentum, gradient in zip(weights, momenta, gradients(step), strict=True):
            gradient = gradient.double()
            momentum.copy_(beta * momentum + gradient)
            update = sign(gradient + beta * momentum if nesterov else momentum)
            scale = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
            weight.copy_((1 - LR * DECAY) * weight - LR * scale * update)
    return [weight.float() for weight in weights]


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_follows_the_papers_formulas(nesterov):
    weights = parameters()
    optimizer = Muon(weights, LR, weight_decay=DECAY, nesterov=nesterov)
    found = stepped(weights, optimizer)
    expected = reference(beta=0.95, nesterov=nesterov)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * LR * 1.5 * ROUNDING)


def test_specsgd_is_muon_without_momentum_and_keeps_no_state():
    weights = parameters()
    optimizer = SpecSGD(weights, LR, weight_decay=DECAY)
    found = stepped(weights, optimizer)
    expected = reference(beta=0.0, nesterov=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * LR * 1.5 * ROUNDING)
    assert not optimizer.state


def test_specsgd_with_the_exact_sign_is_an_svd():
    def svd_sign(matrix: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right

    weights = parameters()
    optimizer = SpecSGD(weights, LR, weight_decay=DECAY, matrix_sign="exact")
    found = stepped(weights, optimizer)
    expected = reference(beta=0.0, nesterov=False, sign=svd_sign)
    # Each of four steps rounds weights of up to 4 three times.
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 3 * 4 * 2**-24)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_muon_takes_torchs_steps(scaling, monkeypatch):
    # torch's orthogonalises in bfloat16: here it runs in float32, so that only rounding differs.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    weights, theirs = parameters(), parameters()
    ours = Muon(weights, LR, weight_decay=DECAY, scaling=scaling)
    other = torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn=scaling)
    found, expected = stepped(weights, ours), stepped(theirs, other)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * LR * 1.5 * ROUNDING)


def test_muon_in_bfloat16_takes_torchs_steps_to_that_precision():
    weights, theirs = parameters(), parameters()
    optimizer = Muon(weights, LR, weight_decay=DECAY, precision="bfloat16")
    found = stepped(weights, optimizer, steps=1)
    expected = stepped(theirs, torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY), steps=1)
    start = [weight.detach() for weight in parameters()]
    for mine, other, weight in zip(found, expected, start, strict=True):
        # Each of some 15 products rounds by 2^-9 of a spectral norm near 1; the quintic is at most
        # as steep as 3.4445 in the last step and flat or contracting where values have settled.
        step = (other - (1 - LR * DECAY) * weight).norm()
        assert (mine - other).norm() < 3.4445 * 15 * 2**-9 * step


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [("original", 1.5), ("match_rms_adamw", 0.6), ("spectral", 1.5), ("none", 1.0)],
)
def test_scaling_of_a_nine_by_four_update(scaling, factor):
    assert SCALINGS[scaling](9, 4) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [("original", 1.0), ("match_rms_adamw", 0.6), ("spectral", 2 / 3), ("none", 1.0)],
)
def test_scaling_of_a_four_by_nine_update(scaling, factor):
    assert SCALINGS[scaling](4, 9) == pytest.approx(factor)


def test_every_argument_reaches_the_update():
    seen = []
    for changes in (
        {"scaling": "original"},
        {"scaling": "none"},
        {"scaling": "match_rms_adamw"},
        {"coefficients": "polar_express"},
        {"steps": 6},
        {"precision": "bfloat16"},
    ):
        weights = parameters()
        optimizer = Muon(weights, LR, weight_decay=DECAY, **changes)
        tall = stepped(weights, optimizer, steps=1)[1]
        assert not any(torch.equal(tall, other) for other in seen), changes
        seen.append(tall)


def test_memory_bounded_batches_give_the_same_steps(monkeypatch):
    found = []
    for entries in (2**26, 40):
        monkeypatch.setattr(matrix_ownership, "_BATCH_ENTRIES", entries)
        weights = parameters()
        found.append(stepped(weights, Muon(weights, LR)))
    torch.testing.assert_close(*found, rtol=0, atol=4 * LR * 1.5 * ROUNDING)


def test_zero_gradient_moves_nothing_but_the_decay():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, LR, weight_decay=DECAY)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    shrunk = [(1 - LR * DECAY) * weight for weight in before]
    torch.testing.assert_close([weight.detach() for weight in weights], shrunk)


@pytest.mark.parametrize("settings", [MuonSettings, SpecSGDSettings])
def test_matrix_rule_takes_the_block_matrices_and_adamw_the_rest(settings):
    model = Llama(odd_model())
    model.init_weights(seed=0)
    adamw = AdamWPart(lr=0.5, weight_decay=0.3, beta1=0.8, beta2=0.7, epsilon=1e-3)
    optimizer = settings(lr=LR, weight_decay=DECAY, adamw=adamw).build(model)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of.pop(parameter)
        if "attention.w" in name or "feed_forward.w" in name:
            assert (group["lr"], group["weight_decay"]) == (LR, DECAY)
            assert "betas" not in group
        else:
            assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.3)
    assert not group_of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MuonSettings(scaling="big"), r"optimizer\.scaling=big .*match_rms_adamw"),
        (lambda: MuonSettings(coefficients="x"), r"optimizer\.coefficients=x .*polar_express"),
        (lambda: MuonSettings(matrix_sign="svd"), r"optimizer\.matrix_sign=svd .*exact"),
        (lambda: MuonSettings(precision="half"), r"optimizer\.precision=half .*bfloat16"),
        (lambda: MuonSettings(steps=0), r"optimizer\.steps=0 must be at least 1"),
        (lambda: MuonSettings(momentum=-0.1), r"optimizer\.momentum=-0\.1"),
        (lambda: MuonSettings(momentum=0.0), r"optimizer\.nesterov=true .*optimizer\.momentum=0"),
        (lambda: AdamWPart(beta1=1.0), r"optimizer\.adamw\.beta1=1\.0"),
        (lambda: AdamWPart(lr=-1.0), r"optimizer\.adamw\.lr=-1\.0"),
        (lambda: AdamWPart(epsilon=0.0), r"optimizer\.adamw\.epsilon=0\.0"),
    ],
)
def test_bad_setting_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
