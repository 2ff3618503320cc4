"""Every rule takes one process's steps on every layout, and resumes from another's checkpoint.

Gradients of Llama are made up here and equal on all layouts, so that nothing but the rules is
compared. A model with convolutions, frozen and unused weights is trained beside it, and compared
with formulas in float64.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.model.llama import Llama
from gns_pretrain.model.roles import unwrapped
from gns_pretrain.optim.adago import AdaGO, AdaGOSettings
from gns_pretrain.optim.adagrad_norm import AdaGradNormSettings
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.combined import CombinedOptimizer, split_parameters
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import Signum, SignumSettings
from gns_pretrain.optim.spectral import Muon, MuonSettings, SpecSGDSettings
from gns_pretrain.optim.subset_norm import SubsetNorm, SubsetNormSettings
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
    "adago": AdaGOSettings(lr=LR, adamw=PART),
    "adagrad": CustomSettings(class_path="torch.optim.Adagrad", lr=LR),
    "adagrad_norm": AdaGradNormSettings(lr=1.0),
    "subset_norm": SubsetNormSettings(lr=LR, refresh_every=3, adamw=PART),
    "nadam": CustomSettings(class_path="torch.optim.NAdam", lr=LR),
}
KINDS = {2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
RESUMED = (
    *("signsgd", "signum", "specsgd", "muon", "nadam"),
    *("adago", "adagrad", "adagrad_norm", "subset_norm"),
)
SPECTRAL = ("specsgd", "specsgd_exact", "muon", "muon_bfloat16", "adago")
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
    """Whether every tensor of the optimizer's state is sharded as its weight is, or as its rows.

    A subspace's basis has no rows of its weight: it is on every rank.
    """
    buffers = [
        (weight, value)
        for weight, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.ndim > 0 and name != "basis"
    ]

    def placements(weight: Tensor, *, whole_rows: bool) -> list[object] | None:
        if not isinstance(weight, DTensor):
            return None
        splits_row = [getattr(placement, "dim", 0) > 0 for placement in weight.placements]
        return [
            Replicate() if whole_rows and splits else placement
            for placement, splits in zip(weight.placements, splits_row, strict=True)
        ]

    return all(
        type(value) is (DTensor if isinstance(weight, DTensor) else Tensor)
        and placements(value, whole_rows=False)
        == placements(weight, whole_rows=value.shape != weight.shape)
        for weight, value in buffers
    )


def train_each(place: RankInfo, folder: Path) -> dict[tuple[str, str, str], float]:
    """One rank's part: every rule on every layout, and from the two ranks' FSDP checkpoints."""
    found = train_net(place)
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


class Conv1D(nn.Module):
    """GPT-2's kind of linear layer, whose weight is [in, out]."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) / columns**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """Anybody's model in float64: its matrices are of every kind, and the ranks divide few."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.wide = nn.Linear(24, 16)
        self.narrow = nn.Linear(16, 7)
        self.swapped = Conv1D(7, 10)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.unused = nn.Linear(5, 5)
        self.at_times = nn.Linear(7, 7, bias=False)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)
        self.double()

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.conv(x).flatten(1)
        x = self.narrow(self.wide(x).relu()).tanh()
        if step % 2:
            x = x + self.at_times(x)
        x = self.swapped(x).tanh()
        return self.head(self.norm(x + self.frozen(x))).square().mean()


NET_MATRICES = ("conv.weight", "wide.weight", "narrow.weight", "at_times.weight", "unused.weight")
NET_LAYOUTS = {
    2: ("ddp", "ddp_alone", "nested", "root", "columns", "tensor"),
    4: ("hsdp", "root", "fsdp_tensor"),
}
NET_RULES = ("net_muon", "net_exact", "net_adago", "net_subset_norm")
NET_LR, NET_DECAY, NET_STEPS, NET_BATCH = 0.05, 0.1, 4, 16


def net_batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(NET_BATCH, 2, 4, 4, generator=generator, dtype=torch.float64)


def net_optimizer(
    model: nn.Module, rule: str, group: ProcessGroup | None = None
) -> CombinedOptimizer:
    matrices, others = split_parameters(model)
    options = {"lr": NET_LR, "weight_decay": NET_DECAY}
    of_matrices: torch.optim.Optimizer
    if rule == "net_subset_norm":
        of_matrices = SubsetNorm(matrices, rank_share=0.5, refresh_every=2, **options)
    elif rule == "net_adago":
        of_matrices = AdaGO(matrices, matrix_sign="exact", process_group=group, **options)
    else:
        sign = "exact" if rule == "net_exact" else "newton_schulz"
        of_matrices = Muon(matrices, matrix_sign=sign, process_group=group, **options)
    return CombinedOptimizer([of_matrices, Signum(others, NET_LR, momentum=0.9)])


def parallel_net(layout: str, place: RankInfo) -> tuple[nn.Module, int, int, ProcessGroup | None]:
    """A layout's model, this rank's place among those with other samples, and their number."""
    net, ranks = Net(), (place.num_ranks,)
    two = (2, place.num_ranks // 2)
    if layout.startswith("ddp"):
        ddp = DistributedDataParallel(net, find_unused_parameters=True)
        group = ddp.process_group if layout == "ddp" else None
        return ddp, place.rank, place.num_ranks, group
    if layout == "tensor":
        mesh = init_device_mesh("cpu", ranks, mesh_dim_names=("tensor",))
        parallelize_module(net, mesh, NET_PLAN)
        return net, 0, 1, None
    if layout == "fsdp_tensor":
        mesh = init_device_mesh("cpu", two, mesh_dim_names=("data", "tensor"))
        parallelize_module(net, mesh["tensor"], NET_PLAN)
        fully_shard(net.wide, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
        return net, mesh.get_local_rank("data"), 2, None
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", two, mesh_dim_names=("replica", "shard"))
    else:
        mesh = init_device_mesh("cpu", ranks, mesh_dim_names=("shard",))
    options = {"mesh": mesh}
    if layout == "columns":  # FSDP2 takes dimensions that the ranks divide; a kernel's is no column
        options["shard_placement_fn"] = lambda w: (
            Shard(1) if w.ndim > 1 and w.shape[1] % 2 == 0 else Shard(0)
        )
    if layout != "root":
        fully_shard(net.wide, **options)
        fully_shard([net.conv, net.swapped], **options)
    fully_shard(net, **options)
    return net, place.rank, place.num_ranks, None


NET_PLAN = {"wide": ColwiseParallel(), "narrow": RowwiseParallel()}


def train_net(place: RankInfo) -> dict[tuple[str, str, str], float]:
    """One rank's part in training `Net` on each layout."""
    found: dict[tuple[str, str, str], float] = {}
    here = replace(place, rendezvous=f"{place.rendezvous}-net")
    with joined(here, ParallelSettings(kind="ddp"), torch.device("cpu")):
        for layout in NET_LAYOUTS[place.num_ranks]:
            for rule in NET_RULES:
                model, rank, num_ranks, group = parallel_net(layout, place)
                optimizer = net_optimizer(model, rule, group)
                with CommDebugMode() as counted:
                    optimizer.step()  # without gradients: nothing moves, nobody waits
                assert counted.get_total_counts() == 0
                for step in range(NET_STEPS):
                    model(net_batch(step).chunk(num_ranks)[rank], step).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                expected = net_reference(rule)
                for name, weight in whole_weights(model).items():
                    difference = (weight - expected[name]).abs().max().item()
                    found[layout, rule, name] = difference
                found[layout, rule, "sharded alike"] = float(sharded_like_weights(optimizer))
                KEPT.append(model)
    return found


KEPT: list[nn.Module] = []  # a rank that drops a DDP model right after a step can hang


def net_reference(rule: str) -> dict[str, Tensor]:
    """Weights after all steps of one process, by the rules' formulas."""

    def sign(matrix: Tensor) -> Tensor:
        if rule != "net_muon":
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            return left @ right
        x = matrix / matrix.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    def subset_norm(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        rank = max(1, round(0.5 * min(gradient.shape)))
        if not state:
            state["step"], state["rows"] = torch.tensor(0), torch.zeros(len(gradient), 1)
            generator = torch.Generator().manual_seed(0)
            state["basis"] = torch.randn(gradient.shape[1], rank, generator=generator).double()
        if (age := state["step"].item() % 2) == 0:
            for _ in range(2):
                state["basis"] = torch.linalg.qr(gradient.T @ (gradient @ state["basis"])).Q
            state["average"] = torch.zeros(len(gradient), rank)
        state["step"] += 1
        inside = gradient @ state["basis"]
        state["average"] = 0.9 * state["average"] + 0.1 * inside
        state["rows"] = 0.95 * state["rows"] + 0.05 * gradient.square().sum(1, keepdim=True)
        corrected = state["average"] / (1 - 0.9 ** (age + 1))
        rows = state["rows"] / (1 - 0.95 ** state["step"].item())
        return (gradient + (corrected - inside) @ state["basis"].T) / (rows.sqrt() + 1e-8)

    net = Net()
    states: dict[str, dict[str, Tensor]] = {name: {} for name, _ in net.named_parameters()}
    momenta = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    for step in range(NET_STEPS):
        net.zero_grad(set_to_none=True)
        net(net_batch(step), step).backward()
        for name, weight in net.named_parameters():
            gradient, momentum = weight.grad, momenta[name]
            if gradient is None:
                continue
            with torch.no_grad():
                is_matrix = name in NET_MATRICES or name == "swapped.weight"
                if is_matrix and rule == "net_subset_norm":
                    update = subset_norm(gradient.flatten(1), states[name]).view_as(weight)
                    weight.mul_(1 - NET_LR * NET_DECAY).sub_(NET_LR * update)
                elif is_matrix:
                    momentum.mul_(0.95).add_(gradient)
                    along = momentum if rule == "net_adago" else gradient + 0.95 * momentum
                    update = sign(along.flatten(1)).view_as(weight)
                    length = NET_LR
                    if rule == "net_adago":
                        norm = gradient.norm().clamp_max(1.0)
                        total = states[name].get("sum", torch.tensor(1e-16)) + norm.square()
                        states[name]["sum"] = total
                        length = NET_LR * (norm / total.sqrt()).clamp_min(0.01).item()
                    rows, columns = weight.flatten(1).shape
                    if name == "swapped.weight":
                        rows, columns = columns, rows
                    weight.mul_(1 - length * NET_DECAY)
                    weight.sub_(length * max(1.0, rows / columns) ** 0.5 * update)
                else:
                    momentum.mul_(0.9).add_(0.1 * gradient)
                    weight.sub_(NET_LR * momentum.sign())
    return {name: weight.detach() for name, weight in net.named_parameters()}


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
    num_nets = sum(map(len, NET_LAYOUTS.values())) * len(NET_RULES)
    assert alike == [1.0] * ((2 + 3) * len(RULES) + num_nets)


@pytest.mark.parametrize("kind", KINDS[4])
def test_element_wise_rules_need_no_collective(kind, on_four):
    for rule in ("sgd_momentum", "signsgd", "signum", "adamw", "adagrad", "subset_norm"):
        assert on_four[kind, rule, "collectives"] == 0, rule
    # Normalising takes the norm of all: one sum over shards.
    for rule in ("normalized_sgd", "adagrad_norm"):
        assert on_four[kind, rule, "collectives"] == (0 if kind == "ddp" else 1), rule


@pytest.mark.parametrize("rule", SPECTRAL)
def test_matrix_rules_exchange_once_a_shape_and_way(rule, on_four):
    for kind in KINDS[4]:
        ways = 1 if kind == "ddp" else 2 + (rule == "adago")  # its norms
        assert on_four[kind, rule, "collectives"] == ways * NUM_SHAPES, kind


@pytest.mark.parametrize("rule", NET_RULES)
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(n, layout) for n, layouts in NET_LAYOUTS.items() for layout in layouts],
)
def test_any_model_on_any_layout_follows_the_formulas(rule, num_ranks, layout, request):
    found = request.getfixturevalue({2: "on_two", 4: "on_four"}[num_ranks])
    # Newton–Schulz runs in float32. The eigenvectors of a float64 Gram lose the square of a
    # gradient's condition, which is below 1e4 here.
    # AdaGO keeps its one number in float32.
    allowed = {"net_muon": TOLERANCE, "net_adago": NET_STEPS * NET_LR * 2 * 2**-24}.get(
        rule, 2**-53 * 1e8
    )
    moved = {name for name, weight in Net().named_parameters() if weight.requires_grad}
    for name in moved - {"unused.weight", "unused.bias"}:
        assert found[layout, rule, name] <= allowed, name
    for name in ("unused.weight", "unused.bias", "frozen.weight"):
        assert found[layout, rule, name] == 0.0, name
