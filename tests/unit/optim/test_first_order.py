"""SGD and its kin, Signum, signSGD, AdamW: against plain references and torch's own."""

import copy
import math
import shutil

import pytest
import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.sgd import SGD, SGDSettings
from gns_pretrain.optim.signum import Signum, SignumSettings
from tests.settings import odd_model

SHAPES = [(5, 3), (7,), (2, 2)]
LR, DECAY = 0.1, 0.2


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


def test_signum_by_hand():
    # m = 0.75 * 0 + 0.25 * (4, -8, 0) has signs +, -, 0; (1, 1, 1) shrinks to 0.98 first.
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([4.0, -8.0, 0.0])
    groups = [{"params": [weight], "weight_decay": DECAY}]
    optimizer = Signum(groups, lr=LR, momentum=0.75)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.88, 1.08, 0.98]))
    momentum = optimizer.state[weight]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.tensor([1.0, -2.0, 0.0]))
    # m = 0.75 * (1, -2, 0) + 0.25 * (-4, 0, 4) = (-0.25, -1.5, 1).
    weight.grad = torch.tensor([-4.0, 0.0, 4.0])
    optimizer.step()
    expected = torch.tensor([0.88 * 0.98 + 0.1, 1.08 * 0.98 + 0.1, 0.98 * 0.98 - 0.1])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_signum_follows_the_plain_rule(beta):
    weights = parameters()
    expected = [weight.detach().clone() for weight in weights]
    averages = [torch.zeros_like(weight) for weight in expected]
    for step in range(4):
        for weight, average, gradient in zip(expected, averages, gradients(step), strict=True):
            average.copy_(beta * average + (1 - beta) * gradient)
            weight.copy_((1 - LR * DECAY) * weight - LR * average.sign())
    groups = [{"params": weights, "weight_decay": DECAY}]
    found = stepped(weights, Signum(groups, lr=LR, momentum=beta))
    torch.testing.assert_close(found, expected)


def test_signsgd_keeps_no_state():
    weights = parameters()
    optimizer = Signum([{"params": weights, "weight_decay": 0.0}], lr=LR, momentum=0.0)
    stepped(weights, optimizer)
    assert not optimizer.state


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_compiled_sign_kernel_takes_the_same_steps_and_is_compiled_once(beta):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in ("never", "always"):
        weights = parameters()
        groups = [{"params": weights, "weight_decay": DECAY}]
        optimizer = Signum(groups, lr=LR, momentum=beta, compile=compiled)
        stepped(weights, optimizer, steps=2)
        optimizer.param_groups[0]["lr"] = LR / 3
        found.append(stepped(weights, optimizer, steps=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Fused multiply-adds round once where two operations round twice: a unit in the last place
    # of weights of up to 4, four times.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=4 * 4 * 2**-23)


def test_gradient_is_left_as_it_was_for_whoever_reads_it_after_the_step():
    for momentum in (0.0, 0.9):
        weights = parameters()
        groups = [{"params": weights, "weight_decay": DECAY}]
        stepped(weights, Signum(groups, lr=LR, momentum=momentum), steps=1)
        torch.testing.assert_close([w.grad for w in weights], gradients(0), rtol=0, atol=0)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_takes_torchs_steps(momentum, nesterov):
    weights, theirs = parameters(), parameters()
    ours = SGD([{"params": weights}], lr=LR, momentum=momentum, nesterov=nesterov)
    other = torch.optim.SGD(theirs, lr=LR, momentum=momentum, nesterov=nesterov)
    torch.testing.assert_close(stepped(weights, ours), stepped(theirs, other))


def test_sgd_without_momentum_decays_as_torchs_does():
    # lr * (g + decay * w): coupled and decoupled decay are the same without momentum.
    weights, theirs = parameters(), parameters()
    ours = SGD([{"params": weights, "weight_decay": DECAY}], lr=LR, momentum=0.0)
    other = torch.optim.SGD(theirs, lr=LR, weight_decay=DECAY)
    torch.testing.assert_close(stepped(weights, ours), stepped(theirs, other))


def test_sgd_with_momentum_keeps_the_decay_out_of_the_momentum():
    weights = parameters()
    expected = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for step in range(4):
        for weight, momentum, gradient in zip(expected, momenta, gradients(step), strict=True):
            momentum.copy_(0.9 * momentum + gradient)
            weight.copy_((1 - LR * DECAY) * weight - LR * momentum)
    ours = SGD([{"params": weights, "weight_decay": DECAY}], lr=LR, momentum=0.9)
    torch.testing.assert_close(stepped(weights, ours), expected)


def test_normalised_step_has_the_length_lr_over_all_groups_together():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    groups = [{"params": weights[:1]}, {"params": weights[1:]}]
    after = stepped(weights, SGD(groups, lr=LR, momentum=0.0, normalize=True), steps=1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)])
    whole = torch.cat([gradient.flatten() for gradient in gradients(0)])
    torch.testing.assert_close(moved, LR * whole / whole.norm())


def test_normalised_step_of_a_zero_gradient_goes_nowhere():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    SGD([{"params": [weight]}], lr=LR, momentum=0.0, normalize=True).step()
    torch.testing.assert_close(weight.detach(), torch.ones(3), rtol=0, atol=0)


def llama() -> Llama:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return model


def test_adamw_is_torchs_with_the_norms_left_undecayed():
    model, other = llama(), llama()
    ours = AdamWSettings(lr=LR, weight_decay=DECAY).build(model)
    named = dict(other.named_parameters())
    norms = [weight for name, weight in named.items() if "norm" in name]
    rest = [weight for name, weight in named.items() if "norm" not in name]
    theirs = torch.optim.AdamW(
        [{"params": rest, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for net, optimizer in ((model, ours), (other, theirs)):
        tokens = torch.arange(17).view(1, 17)
        for _ in range(3):
            net(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other_weight in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, other_weight, rtol=0, atol=0)


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([{"params": [weight]}], lr=0.5, momentum=0.0)

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert weight.item() == 0.0  # 3 - 0.5 * 6


@pytest.mark.parametrize("settings", [SGDSettings, SignumSettings])
def test_every_parameter_is_in_a_group_and_norms_are_not_decayed(settings):
    model = llama()
    optimizer = settings(weight_decay=DECAY).build(model)
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decays.pop(parameter) == (0.0 if "norm" in name else DECAY)
    assert not decays


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignumSettings(momentum=1.0), r"optimizer\.momentum=1\.0 .*below 1"),
        (lambda: SignumSettings(compile="yes"), r"optimizer\.compile=yes .*auto, always, never"),
        (lambda: SignumSettings(lr=0.0), r"optimizer\.lr=0\.0 must be positive"),
        (lambda: SGDSettings(nesterov=True), r"optimizer\.nesterov=true .*optimizer\.momentum=0"),
        (lambda: SGDSettings(weight_decay=-1.0), r"optimizer\.weight_decay=-1\.0"),
        (lambda: AdamWSettings(beta2=1.5), r"optimizer\.beta2=1\.5"),
        (lambda: AdamWSettings(lr=math.nan), r"optimizer\.lr=nan must be positive and finite"),
        (lambda: AdamWSettings(lr=math.inf), r"optimizer\.lr=inf must be positive and finite"),
        (lambda: AdamWSettings(weight_decay=math.nan), r"weight_decay=nan must be at least 0"),
        (
            lambda: AdamWSettings(weight_decay=math.inf),
            r"weight_decay=inf must be .* below inf",
        ),
        (lambda: AdamWSettings(epsilon=math.nan), r"optimizer\.epsilon=nan must be positive"),
        (lambda: AdamWPart(lr=math.nan), r"optimizer\.adamw\.lr=nan"),
        (lambda: AdamWPart(epsilon=math.inf), r"optimizer\.adamw\.epsilon=inf"),
    ],
)
def test_bad_setting_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_state_dict_brings_momentum_back():
    weights = parameters()
    optimizer = Signum([{"params": weights, "weight_decay": 0.0}], lr=LR, momentum=0.9)
    stepped(weights, optimizer, steps=2)
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    twin = Signum([{"params": twins, "weight_decay": 0.0}], lr=1.0, momentum=0.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(stepped(twins, twin), stepped(weights, optimizer), rtol=0, atol=0)
