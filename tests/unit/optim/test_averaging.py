"""Averaged weights: the recursion, its limits, what they cost, and who sees them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale import NoiseMeter, NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.averaging import (
    COUNTERPART,
    AveragingOptimizer,
    AveragingSettings,
    averaged_weights,
    set_progress,
    two_faced,
)
from gns_pretrain.optim.base import keep_token_half_life, remember_peaks, update_half_life
from gns_pretrain.optim.combined import rules_of
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import load_model, load_tensors
from gns_pretrain.training.initialize import InitSettings, begin_from, find_source
from tests.runs import ALONE
from tests.settings import odd_model

STEPS = 12
Weights = list[nn.Parameter]


def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float64}
    return [nn.Parameter(torch.randn(3, 2, **options)), nn.Parameter(torch.randn(2, **options))]


def loss(matrix: Tensor, vector: Tensor, step: int) -> Tensor:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return ((x @ matrix + vector).tanh() - x[:, :2]).square().mean()


def trained(make: Callable[[Weights], Any], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Training weights and averaged ones, as a vector each, after some steps."""
    both = weights()
    optimizer = make(both)
    for face in two_faced(optimizer):
        face.train()
    for step in range(steps):
        set_progress(optimizer, step / steps)
        loss(*both, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.cat([w.detach().clone().flatten() for w in both])
    for face in two_faced(optimizer):
        face.eval()
    return found, torch.cat([w.detach().clone().flatten() for w in both])


def adamw(both: Weights) -> torch.optim.Optimizer:
    return torch.optim.AdamW(both, lr=0.05, weight_decay=0.1)


def reference(
    share_of: Callable[[int], float], interpolation: float, *, count_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The recursion with x, y and z written out: AdamW over z, gradients at y."""
    z = weights()
    optimizer = adamw(z)
    x = [w.detach().clone() for w in z]
    for step in range(STEPS):
        y = [
            (interpolation * a + (1 - interpolation) * b.detach()).requires_grad_()
            for a, b in zip(x, z, strict=True)
        ]
        for w, gradient in zip(z, torch.autograd.grad(loss(*y, step), y), strict=True):
            w.grad = gradient
        optimizer.step()
        share = share_of(step + 1)
        x = [(1 - share) * a + share * b.detach() for a, b in zip(x, z, strict=True)]
    y = [interpolation * a + (1 - interpolation) * b.detach() for a, b in zip(x, z, strict=True)]
    return torch.cat([w.flatten() for w in y]), torch.cat([w.flatten() for w in x])


KINDS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "gpa": ({"decay": 0.9, "interpolation": 0.7, "count_first": True}, lambda t: 1 - 0.9),
    "ema": ({"decay": 0.9}, lambda t: (1 - 0.9) / (1 - 0.9**t)),
    "ema with its first": ({"decay": 0.9, "count_first": True}, lambda t: 1 - 0.9),
    "uniform": ({}, lambda t: 1 / t),
    "uniform with its first": ({"count_first": True}, lambda t: 1 / (t + 1)),
    # Steps 1 to 6 begin before half of the budget is consumed.
    "uniform, late": ({"start": 0.5}, lambda t: 1 / max(t - 6, 1)),
    "gpa, late": (
        {"decay": 0.9, "interpolation": 0.5, "count_first": True, "start": 0.5},
        lambda t: 1.0 if t <= 6 else 1 - 0.9,
    ),
    "schedule-free": ({"interpolation": 0.9}, lambda t: 1 / t),
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_recursion_with_all_three_written_out(kind):
    options, share_of = KINDS[kind]
    found = trained(lambda both: AveragingOptimizer(adamw(both), **options))
    expected = reference(share_of, options.get("interpolation", 0.0))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=STEPS * 10 * 2**-50)


@pytest.mark.parametrize(
    ("library", "base"),
    [
        (
            lambda both: SGDScheduleFree(both, lr=0.3, momentum=0.8, weight_lr_power=0),
            lambda both: torch.optim.SGD(both, lr=0.3),
        ),
        (
            lambda both: AdamWScheduleFree(both, lr=0.05, betas=(0.8, 0.95), weight_lr_power=0),
            lambda both: torch.optim.AdamW(both, lr=0.05, betas=(0.0, 0.95), weight_decay=0),
        ),
    ],
    ids=["SGD", "AdamW"],
)
def test_uniform_average_that_gradients_are_taken_near_is_schedule_free_learning(library, base):
    found = trained(lambda both: AveragingOptimizer(base(both), interpolation=0.8))
    for mine, theirs in zip(found, trained(library), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=STEPS * 10 * 2**-50)


def test_average_that_keeps_nothing_is_the_plain_optimizer():
    plain, _ = trained(adamw)
    for interpolation in (0.0, 0.9):
        options: dict[str, Any] = {"decay": 0.0, "interpolation": interpolation}
        for mine in trained(lambda both, o=options: AveragingOptimizer(adamw(both), **o)):
            torch.testing.assert_close(mine, plain, rtol=0, atol=STEPS * 10 * 2**-50)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {}])
def test_average_beside_training_leaves_its_bits(options):
    found, average = trained(lambda both: AveragingOptimizer(adamw(both), **options))
    plain, _ = trained(adamw)
    assert torch.equal(found, plain)
    assert not torch.equal(average, plain)


def test_weight_whose_first_gradient_comes_late_is_averaged_over_all_steps():
    matrix, vector = weights()
    begun = vector.detach().clone()
    optimizer = AveragingOptimizer(torch.optim.AdamW([matrix, vector], lr=0.05))
    seen = []
    for step in range(4):
        zero = torch.zeros_like(vector)
        loss(matrix, vector if step >= 2 else zero, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(vector.detach().clone())
    optimizer.eval()
    assert torch.equal(seen[1], begun)
    torch.testing.assert_close(vector.detach(), torch.stack(seen).mean(0))


def llama() -> Llama:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return model


def step_along(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    tokens = torch.arange(17).view(1, 17)
    for _ in range(steps):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


GPA = AveragingSettings("ema", decay=0.9, interpolation=0.7, count_first=True)
MUON = MuonSettings(lr=0.02, adamw=AdamWPart(lr=0.01))


def state_size(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("averaging", [GPA, AveragingSettings("uniform")])
def test_average_costs_one_float32_copy_of_the_weights(averaging):
    sizes = []
    for settings in (AveragingSettings(), averaging):
        model = llama()
        optimizer = settings.build(MUON, model)
        step_along(model, optimizer)
        with averaged_weights(model, optimizer):
            sizes.append(state_size(optimizer))  # evaluation holds no more
    assert sizes[1] - sizes[0] == 4 * sum(w.numel() for w in model.parameters())


class Faces(torch.optim.Optimizer):
    """Gradient steps whose evaluated weights are 0.7 of the trained ones: rounded, both ways."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "trains": False})

    @torch.no_grad()
    def scale(self, trains, factor):
        for group in self.param_groups:
            for weight in group["params"] if group["trains"] != trains else ():
                weight *= factor
            group["trains"] = trains

    def train(self):
        self.scale(True, 1 / 0.7)

    def eval(self):
        self.scale(False, 0.7)

    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["trains"] for group in self.param_groups)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("steps", torch.zeros(())).add_(1)
                weight -= group["lr"] * weight.grad


FACES = CustomSettings(class_path=f"{__name__}.Faces", lr=0.05)
SCHEDULE_FREE = CustomSettings(class_path="schedulefree.AdamWScheduleFree", lr=0.02)
OPTIMIZERS = {
    "gpa of muon": (GPA, MUON),
    "uniform of adamw": (AveragingSettings("uniform"), AdamWSettings(lr=0.02)),
    "train() and eval()": (AveragingSettings(), FACES),
    "schedule-free": (AveragingSettings(), SCHEDULE_FREE),
    "schedule-free, and AdamW": (
        AveragingSettings(),
        CustomSettings(
            class_path="schedulefree.SGDScheduleFree", lr=0.5, parameters="block_matrices"
        ),
    ),
}


def built(name: str) -> tuple[Llama, torch.optim.Optimizer]:
    averaging, settings = OPTIMIZERS[name]
    model = llama()
    optimizer = averaging.build(settings, model)
    remember_peaks(optimizer)
    return model, optimizer


def copies(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoint_has_the_average_as_its_model_and_resumes_bit_for_bit(name, tmp_path):
    model, optimizer = built(name)
    step_along(model, optimizer)
    training = copies(model)
    with averaged_weights(model, optimizer):
        averaged = copies(model)
    assert same(copies(model), training)
    assert not same(averaged, training)

    checkpoints = Checkpoints(tmp_path, keep=1, world=ALONE)
    saved = checkpoints.save(model, optimizer, {"step": 2, "optimizer": rules_of(optimizer)})
    assert same(copies(model), training)
    assert same(copies(load_model(saved)), averaged)

    twin, other = built(name)
    checkpoints.load_latest(twin, other)
    assert same(copies(twin), training)
    step_along(model, optimizer, 3)
    step_along(twin, other, 3)
    assert same(copies(twin), copies(model))
    with averaged_weights(model, optimizer), averaged_weights(twin, other):
        assert same(copies(twin), copies(model))


def test_training_weights_of_an_average_are_in_its_checkpoint_by_name(tmp_path):
    model, optimizer = built("gpa of muon")
    step_along(model, optimizer)
    saved = Checkpoints(tmp_path, keep=1, world=ALONE).save(model, optimizer, {"step": 2})
    names = {name: f"optimizer.state.{name}.{COUNTERPART}" for name, _ in model.named_parameters()}
    tensors = {names[name]: torch.empty_like(weight) for name, weight in llama().named_parameters()}
    load_tensors(tensors, saved)
    assert same([tensors[name] for name in names.values()], copies(model))


def test_run_begins_from_an_average_with_its_weights_or_goes_on_with_all_of_it(tmp_path):
    model, optimizer = built("gpa of muon")
    step_along(model, optimizer)
    state = {"step": 2, "optimizer": rules_of(optimizer)}
    saved = Checkpoints(tmp_path, keep=1, world=ALONE).save(model, optimizer, state)
    settings = InitSettings(str(saved), "weights")
    other = llama()
    plain = MUON.build(other)
    source = find_source(settings)
    assert source is not None
    begin_from(source, settings, other, plain, ALONE)
    with averaged_weights(model, optimizer):
        assert same(copies(other), copies(model))

    settings = InitSettings(str(saved), "all")
    with pytest.raises(InputError, match=r"source's state is of \['exponential average', 'Muon'"):
        begin_from(source, settings, other, plain, ALONE)
    twin, averaging = built("gpa of muon")
    begin_from(source, settings, twin, averaging, ALONE)
    step_along(model, optimizer)
    step_along(twin, averaging)
    assert same(copies(twin), copies(model))


def test_counts_of_a_class_that_averages_by_itself_are_not_gone_on_from(tmp_path):
    model, optimizer = built("schedule-free")
    step_along(model, optimizer)
    state = {"step": 2, "optimizer": rules_of(optimizer)}
    saved = Checkpoints(tmp_path, keep=1, world=ALONE).save(model, optimizer, state)
    settings = InitSettings(str(saved), "all")
    source = find_source(settings)
    assert source is not None
    with pytest.raises(InputError, match=r"AdamWScheduleFree .*use init\.what=weights"):
        begin_from(source, settings, *built("schedule-free"), ALONE)


def test_half_life_of_an_average_stays_when_it_is_tied_to_tokens():
    model = llama()
    optimizer = AveragingSettings("ema", decay=0.9).build(AdamWSettings(), model)
    keep_token_half_life(optimizer, 8)
    update_half_life(optimizer, 16)
    assert {group["average_decay"] for group in optimizer.param_groups} == {0.9**2}


def test_averaged_weights_are_those_that_train_where_there_is_no_average():
    model = llama()
    optimizer = AdamWSettings().build(model)
    versions = [weight._version for weight in model.parameters()]
    with averaged_weights(model, optimizer) as kept:
        assert kept == {}
    assert [weight._version for weight in model.parameters()] == versions


def test_a_step_of_averaged_weights_is_refused():
    model, optimizer = built("uniform of adamw")
    with (
        averaged_weights(model, optimizer),
        pytest.raises(RuntimeError, match=r"call train\(\) before"),
    ):
        step_along(model, optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AveragingSettings("ema"), r"kind=ema needs averaging\.decay; 0\.999"),
        (lambda: AveragingSettings(decay=0.9), r"decay=0\.9 is not read by averaging\.kind=none"),
        (lambda: AveragingSettings(start=0.5), r"start=0\.5 is not read by .*kind=none"),
        (lambda: AveragingSettings("uniform", decay=0.9), r"decay=0\.9 is not read by .*=uniform"),
        (lambda: AveragingSettings("gpa"), r"kind=gpa is not known; use one of none, ema, uniform"),
        (lambda: AveragingSettings("uniform", interpolation=1.0), r"interpolation=1\.0 must be"),
        (lambda: GPA.build(FACES, llama()), r"kind=ema averages what Faces averages already"),
        (
            lambda: AveragingOptimizer(GPA.build(AdamWSettings(), llama()), decay=0.9),
            r"averages what AveragingOptimizer averages already, .*; use one of them alone",
        ),
        (
            lambda: CustomSettings(class_path=FACES.class_path, tie_to_tokens=True),
            r"tie_to_tokens=true .*test_averaging\.Faces takes gradients; use .*=false",
        ),
        (
            lambda: NoiseMeter(
                model := llama(),
                NoiseScaleSettings(["adam"]),
                optimizer=AveragingSettings().build(SCHEDULE_FREE, model),
            ),
            r"keep, and this optimizer has none; use optimizer=adamw",
        ),
        (
            lambda: CustomSettings(class_path="schedulefree.ScheduleFreeWrapper"),
            r"ScheduleFreeWrapper is not a torch\.optim\.Optimizer",
        ),
        (
            lambda: CustomSettings(class_path="schedulefree.AdamWScheduleFreeClosure"),
            r"AdamWScheduleFreeClosure cannot take a step",
        ),
    ],
)
def test_mistake_is_named_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
