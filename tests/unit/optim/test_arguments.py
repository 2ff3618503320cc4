"""The optimizers as a library: parameters or groups as torch's optimizers take them."""

import math

import pytest
import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.optim import SGD, Muon, SignSGD, Signum, SpecSGD, split_parameters


def weight(*shape: int, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, device=device))


@pytest.mark.parametrize("rule", [Muon, SpecSGD, Signum, SignSGD, SGD])
def test_parameters_named_ones_and_groups_are_taken(rule):
    model = nn.Linear(3, 4, bias=False)
    for params in (model.parameters(), model.named_parameters(), [{"params": [model.weight]}]):
        optimizer = rule(params, lr=0.1)
        model.weight.grad = torch.ones(4, 3)
        before = model.weight.detach().clone()
        optimizer.step()
        assert (model.weight < before).all()


def test_group_overrides_and_a_later_group_joins():
    first, second = weight(3, 3), weight(3, 3)
    optimizer = Muon([{"params": [first], "lr": 0.5}], lr=0.1, scaling="none", matrix_sign="exact")
    optimizer.add_param_group({"params": [second], "momentum": 0.0, "weight_decay": 0.5})
    for each in (first, second):
        each.grad = torch.eye(3)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.ones(3, 3) - 0.5 * torch.eye(3))
    torch.testing.assert_close(second.detach(), 0.95 * torch.ones(3, 3) - 0.1 * torch.eye(3))
    assert first in optimizer.state
    assert second not in optimizer.state


def test_transposed_group_is_scaled_by_the_rows_that_it_has_as_a_linear_layer():
    updates = []
    for shape, transposed in (((8, 2), False), ((2, 8), True)):
        matrix = weight(*shape)
        group = {"params": [matrix], "transposed": True} if transposed else {"params": [matrix]}
        optimizer = SpecSGD([group], lr=1.0, matrix_sign="exact")
        gradient = torch.arange(16.0).view(8, 2)
        matrix.grad = gradient.T.contiguous() if transposed else gradient
        optimizer.step()
        updates.append(1 - matrix.detach())
    torch.testing.assert_close(updates[0], updates[1].T)
    # Two singular values of 1, times the root of 8 / 2.
    torch.testing.assert_close(updates[0].norm(), torch.tensor(2.0 * math.sqrt(2.0)))


def test_convolution_is_updated_as_its_matrix_in_any_memory_format():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 3, 2, 2, generator=generator)
    flat, found = weight(4, 12), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=memory_format))
        optimizer = Muon([kernel], lr=0.1)
        for _ in range(2):
            kernel.grad = gradient.to(memory_format=memory_format)
            optimizer.step()
        found.append(kernel.detach().flatten(1))
    optimizer = Muon([flat], lr=0.1)
    for _ in range(2):
        flat.grad = gradient.flatten(1)
        optimizer.step()
    torch.testing.assert_close(found, [flat.detach()] * 2, rtol=0, atol=0)


def test_matrix_without_a_gradient_is_skipped_and_comes_back():
    steady, rare = weight(3, 4), weight(3, 4)
    optimizer = Muon([steady, rare], lr=0.1, weight_decay=0.5)
    for step in range(3):
        steady.grad = torch.ones(3, 4)
        rare.grad = torch.ones(3, 4) if step == 1 else None
        optimizer.step()
        if step == 0:
            assert torch.equal(rare.detach(), torch.ones(3, 4))
            assert rare not in optimizer.state
    alone = weight(3, 4)
    optimizer = Muon([alone], lr=0.1, weight_decay=0.5)
    alone.grad = torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(rare, alone)
    assert (steady < rare).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon([weight(5)]), r"Muon takes matrices, .* shape \[5\]; .*split_parameters"),
        (lambda: SpecSGD([weight(2, 2), weight(7)]), r"SpecSGD takes matrices, .* shape \[7\]"),
        (lambda: Muon([weight(2, 2)], lr=0.0), r"lr=0\.0 must be positive"),
        (lambda: Signum([weight(2)], lr=math.nan), r"lr=nan must be positive"),
        (lambda: SGD([{"params": [weight(2)], "lr": -1.0}]), r"lr=-1\.0 must be positive"),
        (lambda: Muon([weight(2, 2)], momentum=1.0), r"momentum=1\.0 .*below 1"),
        (lambda: Muon([weight(2, 2)], momentum=0.0), r"nesterov=true .*momentum=0"),
        (lambda: SGD([weight(2)], nesterov=True), r"nesterov=true .*momentum=0"),
        (lambda: SignSGD([weight(2)], weight_decay=-0.1), r"weight_decay=-0\.1"),
        (lambda: Signum([weight(2)], compile="yes"), r"compile=yes .*auto, always, never"),
        (lambda: Muon([weight(2, 2)], steps=0), r"steps=0 must be at least 1"),
        (lambda: Muon([weight(2, 2)], coefficients="x"), r"coefficients=x .*polar_express"),
        (lambda: SpecSGD([weight(2, 2)], matrix_sign="svd"), r"matrix_sign=svd .*exact"),
        (lambda: Muon([weight(2, 2)], scaling="big"), r"scaling=big .*match_rms_adamw"),
        (lambda: Muon([weight(2, 2)], precision="half"), r"precision=half .*bfloat16"),
        (
            lambda: Muon([{"params": [weight(2, 2)], "steps": 3}]),
            r"group sets steps, which all groups share; give it to Muon itself",
        ),
        (
            lambda: Muon([weight(2, 2), weight(2, 2, device="meta")]),
            r"parameters are on cpu and meta; make one Muon for each device",
        ),
    ],
)
def test_bad_argument_is_named_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = Muon([weight(2, 2)])
    with pytest.raises(InputError, match="takes matrices"):
        optimizer.add_param_group({"params": [weight(3)]})
    assert len(optimizer.param_groups) == 1


class Conv1D(nn.Module):
    """Stands for transformers' class of that name: its weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = weight(3, 5)
        self.bias = weight(5)


def test_split_puts_matrices_in_groups_and_the_rest_aside():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 3),
            "kernel": nn.Conv2d(3, 4, 2),
            "upwards": nn.ConvTranspose2d(4, 3, 2),
            "swapped": Conv1D(),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "linear": nn.Linear(5, 3),
            "norm": nn.LayerNorm(3),
            "head": nn.Linear(3, 7, bias=False),
        }
    )
    model["head"].weight = model["embedding"].weight
    groups, others = split_parameters(model)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [[name_of[id(p)] for p in group["params"]] for group in groups]
    assert named == [["kernel.weight", "linear.weight"], ["upwards.weight", "swapped.weight"]]
    assert [group.get("transposed", False) for group in groups] == [False, True]
    assert [name_of[id(p)] for p in others] == [
        "embedding.weight",
        *(f"{name}.bias" for name in ("kernel", "upwards", "swapped", "linear")),
        "norm.weight",
        "norm.bias",
    ]


def test_split_takes_a_choice_of_matrices_and_refuses_a_model_without_any():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert [p.shape for p in split_parameters(model)[0][0]["params"]] == [(4, 3)]
    (group,), _ = split_parameters(model, ["*.weight"])
    assert [p.shape for p in group["params"]] == [(4, 3), (5, 4)]
    with pytest.raises(InputError, match="no trainable matrices"):
        split_parameters(nn.LayerNorm(3))
