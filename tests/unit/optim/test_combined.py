"""Several optimizers that act as one."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.combined import CombinedOptimizer, split_parameters
from gns_pretrain.optim.sgd import SGD
from gns_pretrain.optim.spectral import Muon, MuonSettings
from tests.settings import odd_model


def parts() -> tuple[torch.nn.Parameter, torch.nn.Parameter, CombinedOptimizer]:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    composite = CombinedOptimizer(
        [
            SGD([{"params": [first]}], lr=0.5, momentum=0.0),
            torch.optim.AdamW([{"params": [second]}], lr=0.25),
        ]
    )
    return first, second, composite


def test_each_part_moves_its_own_parameters_by_its_own_rate():
    first, second, composite = parts()
    composite.param_groups[0]["lr"] = 2.0  # as the schedule does
    for parameter in (first, second):
        parameter.grad = torch.ones(2)
    composite.step()
    assert first.tolist() == [-1.0, -1.0]
    # AdamW's first step is lr times the sign, after the decay of 0.01.
    torch.testing.assert_close(second.detach(), torch.full((2,), 1 - 0.25 * 0.01 - 0.25))


def test_zero_grad_clears_every_part_and_a_closure_runs_once():
    first, second, composite = parts()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = (first + second).sum()
        loss.backward()
        return loss

    assert composite.step(closure).item() == 4.0
    assert len(calls) == 1
    assert first.tolist() == [0.5, 0.5]
    composite.zero_grad(set_to_none=True)
    assert first.grad is None
    assert second.grad is None


def stepped(model: Llama, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(17).view(1, 17)
    for _ in range(steps):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_state_dict_resumes_bit_for_bit_also_after_the_rates_have_changed():
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = MuonSettings(lr=0.02).build(model)
    stepped(model, optimizer, 2)
    twin = Llama(odd_model())
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other = MuonSettings(lr=9.0).build(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for either in (optimizer, other):
        for group in either.param_groups:
            group["lr"] *= 0.5
    stepped(model, optimizer, 2)
    stepped(twin, other, 2)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def perceptron() -> tuple[nn.Module, CombinedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    matrices, others = split_parameters(model)
    return model, CombinedOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)])


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(8, 6, generator=generator)).square().mean()


def test_schedulers_of_torch_move_all_learning_rates():
    model, optimizer = perceptron()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loss_of(model, 0).backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]
    assert [each.param_groups[0]["lr"] for each in optimizer.optimizers] == [0.01, 0.005]


def test_scaled_gradients_take_the_unscaled_steps_and_an_overflow_none():
    (plain, optimizer), (scaled, other) = perceptron(), perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    before = [weight.detach().clone() for weight in scaled.parameters()]
    for mine, theirs in zip(plain.parameters(), before, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=0)  # a power of 2 is exact
    (scaler.scale(loss_of(scaled, 9)) * torch.inf).backward()
    scaler.step(other)
    for weight, old in zip(scaled.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0)


def test_state_of_torchs_distributed_checkpoint_resumes_bit_for_bit():
    (model, optimizer), (twin, other) = perceptron(), perceptron()
    for step in range(4):
        if step == 2:
            twin.load_state_dict(copy.deepcopy(model.state_dict()))
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            set_optimizer_state_dict(twin, other, state)
        for net, either in ((model, optimizer), (twin, other))[: 1 + (step >= 2)]:
            loss_of(net, step).backward()
            either.step()
            either.zero_grad()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_state_from_before_the_combination_is_kept():
    model, optimizer = perceptron()
    loss_of(model, 0).backward()
    optimizer.step()
    again = CombinedOptimizer(optimizer.optimizers)
    assert again.state == optimizer.state
    assert len(again.state) == 6


def test_groups_that_come_later_and_shared_parameters_are_refused():
    model, optimizer = perceptron()
    with pytest.raises(InputError, match="no further parameter groups; give them to one of its"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer([*optimizer.optimizers, torch.optim.SGD(model.parameters())])
