"""Two rules that act as one optimizer."""

import copy

import torch

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.combined import CombinedOptimizer
from gns_pretrain.optim.sgd import SGD
from gns_pretrain.optim.spectral import MuonSettings
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
