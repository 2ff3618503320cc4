"""Any optimizer by its class path."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.base import remember_peaks, set_learning_rate
from gns_pretrain.optim.custom import CustomSettings
from tests.settings import odd_model

TOKENS = torch.arange(17).view(1, 17)


def llama() -> Llama:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return model


def trained(model: Llama, optimizer: torch.optim.Optimizer, factors: list[float]) -> float:
    remember_peaks(optimizer)
    loss = torch.zeros(())
    for factor in factors:
        set_learning_rate(optimizer, factor)
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def test_nadam_by_its_path_is_nadam_with_our_groups_and_schedule():
    model, other = llama(), llama()
    settings = CustomSettings(
        class_path="torch.optim.NAdam",
        lr=0.01,
        weight_decay=0.1,
        kwargs={"momentum_decay": 0.01, "betas": [0.8, 0.9]},
    )
    named = dict(other.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
    ]
    theirs = torch.optim.NAdam(groups, lr=0.01, momentum_decay=0.01, betas=(0.8, 0.9))
    trained(model, settings.build(model), [0.5, 1.0, 0.25])
    trained(other, theirs, [0.5, 1.0, 0.25])
    for mine, other_weight in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, other_weight, rtol=0, atol=0)


def test_optimizer_of_an_installed_library_trains():
    pytest.importorskip("transformers", reason="the library whose optimizer is named")
    settings = CustomSettings(
        class_path="transformers.optimization.Adafactor",
        lr=0.01,
        kwargs={"scale_parameter": False, "relative_step": False},
    )
    model = llama()
    first = model(TOKENS[:, :-1], TOKENS[:, 1:]).item()
    assert trained(model, settings.build(model), [1.0] * 10) < first - 1.0


def test_class_for_matrices_leaves_the_rest_to_adamw():
    settings = CustomSettings(
        class_path="torch.optim.Muon", lr=0.02, parameters="block_matrices", weight_decay=0.1
    )
    settings.adamw.lr = 0.003
    optimizer = settings.build(llama())
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003, 0.003]
    assert len(optimizer.param_groups[0]["params"]) == 2 * 7
    assert "ns_steps" in optimizer.param_groups[0]
    assert "betas" in optimizer.param_groups[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_path": "torch.optim.Nothing"}, r"class_path=torch\.optim\.Nothing cannot be im"),
        ({"class_path": "nowhere.At.All"}, r"class_path=nowhere\.At\.All .*install its library"),
        ({"class_path": "NAdam"}, r"class_path=NAdam cannot be imported"),
        ({"class_path": "torch.nn.Linear"}, r"class_path=torch\.nn\.Linear is not a torch\.optim"),
        ({"class_path": "torch.optim.SGD", "kwargs": {"beta": 1}}, r"kwargs=.*beta.*is not what"),
        ({"class_path": "torch.optim.Rprop", "weight_decay": 0.1}, r"Rprop has no weight decay"),
        ({"class_path": "torch.optim.SGD", "kwargs": 3}, r"kwargs=3 is not a mapping"),
        ({"class_path": "torch.optim.SGD", "parameters": "2d"}, r"parameters=2d .*block_matrices"),
        (
            {"class_path": "torch.optim.Muon"},
            r"parameters=all hands vectors to torch\.optim\.Muon too: Muon only supports 2D .*; "
            r"use optimizer\.parameters=block_matrices",
        ),
        ({"class_path": "torch.optim.LBFGS"}, r"what torch\.optim\.LBFGS takes: .*doesn't support"),
        (
            {"class_path": "torch.optim.LBFGS", "parameters": "block_matrices"},
            r"class_path=torch\.optim\.LBFGS cannot take a step: .*closure",
        ),
        (
            {"class_path": "torch.optim.SparseAdam"},
            r"class_path=torch\.optim\.SparseAdam cannot take a step: .*dense gradients",
        ),
        (
            {"class_path": "torch.optim.SGD", "kwargs": {"params": []}},
            r"kwargs=.* is not what torch\.optim\.SGD takes: .*multiple values",
        ),
        (
            {"class_path": "torch.optim.SGD", "kwargs": {"lr": 0.5}},
            r"kwargs\.lr is a setting of its own; use optimizer\.lr=0\.5",
        ),
        (
            {"class_path": "torch.optim.SGD", "kwargs": {"weight_decay": 0.5}},
            r"kwargs\.weight_decay is a setting of its own; use optimizer\.weight_decay=0\.5",
        ),
        (
            {
                "class_path": "torch.optim.SGD",
                "kwargs": {"momentum": 0.9},
                "tie_to_tokens": True,
            },
            r"tie_to_tokens=true needs to know .*torch\.optim\.SGD does not say; use",
        ),
    ],
)
def test_mistake_is_named_before_anything_starts(changes, message):
    with pytest.raises(InputError, match=message) as refused:
        CustomSettings(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("class_path", ["torch.optim.SGD", "torch.optim.NAdam"])
def test_class_without_a_momentum_that_may_be_a_sum_can_be_tied_to_tokens(class_path):
    assert CustomSettings(class_path=class_path, tie_to_tokens=True).tie_to_tokens


def test_class_for_matrices_alone_is_refused_for_all_parameters_without_a_vector_group_too():
    with pytest.raises(InputError, match=r"use optimizer\.parameters=block_matrices"):
        CustomSettings(class_path="torch.optim.Muon", decay_matrices_only=False)


class WholeMatrices(torch.optim.Optimizer):
    """Mixes its own plain tensors with gradients, as rules of whole matrices do."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight -= self.param_groups[0]["lr"] * (torch.eye(len(weight)) @ weight.grad)


def test_class_that_cannot_step_along_sharded_weights_is_refused_when_it_is_built(tmp_path):
    path = f"{__name__}.WholeMatrices"
    settings = CustomSettings(class_path=path, parameters="block_matrices")
    model = llama()
    settings.build(model)  # whole weights
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            InputError, match=r"cannot step along sharded weights: .*; use parallel"
        ):
            settings.build(model)
        CustomSettings(class_path="torch.optim.NAdam").build(model)
    finally:
        dist.destroy_process_group()
