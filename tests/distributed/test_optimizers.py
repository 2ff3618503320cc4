"""Every rule takes one process's steps on every layout, and resumes from another's checkpoint.

Gradients are made up here and equal on all layouts, so that nothing but the rules is compared.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from gns_pretrain.model.llama import Llama
from gns_pretrain.model.roles import unwrapped
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings, SpecSGDSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.checkpoint import Checkpoints
from tests.distributed.harness import run_ranks
from tests.settings import odd_model

LR = 0.05
PART = AdamWPart(lr=LR)
RULES: dict[str, OptimizerSettings] = {
    "sgd_momentum": SGDSettings(lr=LR, momentum=0.9, nesterov=True),
    "normalized_sgd": SGDSettings(lr=LR, momentum=0.9, normalize=True),
    "signsgd": SignumSettings(lr=LR, momentum=0.0),
    "signum": SignumSettings(lr=LR),
    "adamw": AdamWSettings(lr=LR),
    "specsgd": SpecSGDSettings(lr=LR, adamw=PART),
    "specsgd_exact": SpecSGDSettings(lr=LR, matrix_sign="exact", adamw=PART),
    "muon": MuonSettings(lr=LR, adamw=PART),
    "muon_bfloat16": MuonSettings(lr=LR, precision="bfloat16", adamw=PART),
    "nadam": CustomSettings(class_path="torch.optim.NAdam", lr=LR),
}
KINDS = {2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
RESUMED = ("signsgd", "signum", "specsgd", "muon", "nadam")
SPECTRAL = ("specsgd", "specsgd_exact", "muon", "muon_bfloat16")
SAVED_AFTER, STEPS = 2, 4
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
NUM_SHAPES = 4  # of block matrices: 18 x 18, 6 x 18, 26 x 18, 18 x 26

# Rounding of a float32 matrix rule: five quintic steps multiply a rounding error by at most
# 3.4445^5, of an update of spectral norm near 1 times sqrt(26 / 18), four times.
TOLERANCE = STEPS * LR * 1.3 * 3.4445**5 * 2**-23


def built(world: World, rule: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    llama = Llama(odd_model(num_layers=1))
    llama.init_weights(seed=0)
    model = parallelize(llama, world, compute_dtype=torch.float32)
    return model, RULES[rule].build(model)


def give_gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in unwrapped(model).parameters():
        whole = torch.randn(weight.shape, generator=generator)
        if isinstance(weight, DTensor):
            mesh, placements = weight.device_mesh, weight.placements
            weight.grad = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        else:
            weight.grad = whole


def advance(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int
) -> None:
    for step in range(first, last):
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    named = unwrapped(model).named_parameters()
    return {
        name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone()
        for name, w in named
    }


def farthest(model: torch.nn.Module, reference: Path, rule: str) -> float:
    """Largest difference of any weight from one process's."""
    expected = torch.load(reference)[rule]
    found = whole_weights(model)
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def loaded(world: World, rule: str, folder: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = built(world, rule)
    state, damaged = Checkpoints(folder / rule, keep=1, world=world).load_latest(model, optimizer)
    assert state is not None
    assert (state["step"], damaged) == (SAVED_AFTER, [])
    return model, optimizer


def collectives_of_a_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    give_gradients(model, 99)
    with CommDebugMode() as counted:
        optimizer.step()
    return counted.get_total_counts()


def sharded_like_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every tensor of the optimizer's state is sharded as its weight is."""
    buffers = [
        (weight, value)
        for weight, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim > 0
    ]
    return all(
        type(value) is (DTensor if isinstance(weight, DTensor) else Tensor)
        and getattr(value, "placements", None) == getattr(weight, "placements", None)
        for weight, value in buffers
    )


def train_each(place: RankInfo, folder: Path) -> dict[tuple[str, str, str], float]:
    """One rank's part: every rule on every layout, and from the two ranks' FSDP checkpoints."""
    found: dict[tuple[str, str, str], float] = {}
    for kind in KINDS[place.num_ranks]:
        here = replace(place, rendezvous=f"{place.rendezvous}-{kind}")
        with joined(here, ParallelSettings(kind=kind), torch.device("cpu")) as world:
            for rule in RULES:
                model, optimizer = built(world, rule)
                advance(model, optimizer, 0, SAVED_AFTER)
                if (kind, place.num_ranks) == ("fsdp", 2) and rule in RESUMED:
                    state = {"step": SAVED_AFTER}
                    checkpoints = Checkpoints(folder / rule, keep=1, world=world)
                    checkpoints.save(model, optimizer, state)
                advance(model, optimizer, SAVED_AFTER, STEPS)
                found[kind, rule, "trained"] = farthest(model, folder / "reference.pt", rule)
                found[kind, rule, "sharded alike"] = float(sharded_like_weights(optimizer))
                found[kind, rule, "collectives"] = collectives_of_a_step(model, optimizer)
                if place.num_ranks == 4 and rule in RESUMED:
                    model, optimizer = loaded(world, rule, folder)
                    advance(model, optimizer, SAVED_AFTER, STEPS)
                    found[kind, rule, "resumed"] = farthest(model, folder / "reference.pt", rule)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one process's weights after all steps of each rule."""
    folder = tmp_path_factory.mktemp("optimizers")
    reference = {}
    for rule in RULES:
        model, optimizer = built(ALONE, rule)
        advance(model, optimizer, 0, STEPS)
        reference[rule] = whole_weights(model)
    torch.save(reference, folder / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def on_two(folder) -> dict[tuple[str, str, str], float]:
    return run_ranks(2, train_each, folder, folder)[0]


@pytest.fixture(scope="module")
def on_four(folder, on_two) -> dict[tuple[str, str, str], float]:
    return run_ranks(4, train_each, folder, folder)[0]


def tolerance(rule: str) -> float:
    """Weights are below 4 and round to half a unit of 2^-22, at most five times a step."""
    return TOLERANCE if rule in SPECTRAL else STEPS * 5 * 2**-23


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_take_the_steps_of_one_process(rule, on_two):
    for kind in KINDS[2]:
        assert on_two[kind, rule, "trained"] <= tolerance(rule), kind


@pytest.mark.parametrize("rule", RULES)
def test_four_ranks_take_the_steps_of_one_process(rule, on_four):
    for kind in KINDS[4]:
        assert on_four[kind, rule, "trained"] <= tolerance(rule), kind


@pytest.mark.parametrize("rule", RESUMED)
def test_checkpoint_of_two_sharded_ranks_resumes_on_every_other_layout(rule, folder, on_four):
    for kind in KINDS[4]:
        assert on_four[kind, rule, "resumed"] <= tolerance(rule), kind
    model, optimizer = loaded(ALONE, rule, folder)
    advance(model, optimizer, SAVED_AFTER, STEPS)
    assert farthest(model, folder / "reference.pt", rule) <= tolerance(rule)


def test_state_is_sharded_like_its_weights(on_two, on_four):
    alike = [v for found in (on_two, on_four) for k, v in found.items() if k[2] == "sharded alike"]
    assert alike == [1.0] * (2 + 3) * len(RULES)


@pytest.mark.parametrize("kind", KINDS[4])
def test_element_wise_rules_need_no_collective(kind, on_four):
    for rule in ("sgd_momentum", "signsgd", "signum", "adamw"):
        assert on_four[kind, rule, "collectives"] == 0, rule
    # Normalising takes the norm of all: one sum over shards.
    assert on_four[kind, "normalized_sgd", "collectives"] == (0 if kind == "ddp" else 1)


@pytest.mark.parametrize("rule", SPECTRAL)
def test_matrix_rules_exchange_once_a_shape_and_way(rule, on_four):
    for kind in KINDS[4]:
        ways = 1 if kind == "ddp" else 2
        assert on_four[kind, rule, "collectives"] == ways * NUM_SHAPES, kind
