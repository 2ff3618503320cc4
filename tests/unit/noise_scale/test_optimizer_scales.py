"""Noise scales that read the optimizer: Adam's own, of composite optimizers, and of a momentum."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale import sample_sums
from gns_pretrain.noise_scale.equations import momentum_noise
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.sample_sums import SampleSums
from gns_pretrain.optim import CombinedOptimizer, Muon, SpecSGD, split_parameters
from tests.dense_reference import (
    Batch,
    adams_noise_and_signal,
    composite_noise_and_signal,
    noise_and_signal,
    sample_gradients,
)

NUM_SAMPLES, SAMPLE_SIZE = 8, 4
BATCH_SIZE = NUM_SAMPLES * SAMPLE_SIZE
MUON_LR, ADAMW_LR = 0.02, 0.01


class Regression(nn.Module):
    """Two matrices inside, a norm, an embedding of one row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(4, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return (self.head(x) - targets).square().mean()


def samples(seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "tokens": torch.randint(0, 4, (SAMPLE_SIZE,), generator=generator),
            "targets": torch.randn(SAMPLE_SIZE, 3, generator=generator),
        }
        for _ in range(NUM_SAMPLES)
    ]


def muon_and_adamw(model: nn.Module) -> CombinedOptimizer:
    matrices, others = split_parameters(model)
    adamw = torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95))
    return CombinedOptimizer([Muon(matrices, lr=MUON_LR, momentum=0.95), adamw])


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, **options: object
) -> list[list[Reading]]:
    """Take steps, each measured before its update; return their readings."""
    meter = NoiseMeter(model, optimizer=optimizer, every_steps=1, **options)
    readings = []
    for step in range(1, count + 1):
        with meter.step(step):
            for sample in samples(step):
                with meter.sample():
                    (model(**sample) / NUM_SAMPLES).backward()
        readings.append(meter.read(BATCH_SIZE))
        if step < count:
            optimizer.step()
        optimizer.zero_grad()
    return readings


def gradients_at(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Every sample's gradient at the model's weights, in float64."""
    double = copy.deepcopy(model).double()
    return sample_gradients(double, [as_double(s) for s in samples(step)], lambda loss: loss)


def as_double(sample: Batch) -> Batch:
    return {key: t.double() if t.is_floating_point() else t for key, t in sample.items()}


def scales_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """v^(1/2) + epsilon of the coming step, of the weights that have second moments."""
    found = {}
    for name, weight in model.named_parameters():
        state = optimizer.state.get(weight, {})
        if "exp_avg_sq" in state:
            v = 0.95 * state["exp_avg_sq"].double() + 0.05 * gradients[name].mean(0).square()
            found[name] = (v / (1 - 0.95 ** (state["step"].item() + 1))).sqrt() + 1e-8
    return found


def test_adam_divides_by_the_optimizers_own_second_moments():
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAMW_LR, betas=(0.9, 0.95))
    estimates = ["plug_in", "debiased", "cross_fitted", "nested"]
    found = steps(model, optimizer, 3, geometries=["adam"], estimates=estimates)
    assert found[0] == []  # there are no second moments yet
    assert len(found[1]) == len(found[2]) == len(estimates)
    gradients = gradients_at(model, 3)
    scales = scales_of(model, optimizer, gradients)
    expected = adams_noise_and_signal(gradients, scales, BATCH_SIZE)
    for reading in found[2]:
        total = reading.total
        numbers = total.gains or (total.noise, total.signal)
        assert numbers == pytest.approx(expected["adam", total.estimate], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "maximize": True},
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
    ],
    ids=str,
)
def test_adam_divides_as_the_coming_step_does(options: dict[str, float | bool]):
    model = Regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.5), **options)
    total = steps(model, optimizer, 6, geometries=["adam"])[5][0].total
    gradients = gradients_at(model, 6)
    for name, weight in model.named_parameters():
        weight.grad = gradients[name].mean(0).float()
    optimizer.step()
    scales = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        v = state["max_exp_avg_sq" if "amsgrad" in options else "exp_avg_sq"].double()
        scales[name] = (v / (1 - 0.5**6)).sqrt() + 1e-8
    expected = adams_noise_and_signal(gradients, scales, BATCH_SIZE)["adam", "plug_in"]
    assert (total.noise, total.signal) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("geometry", ["adam", "composite"])
def test_rows_are_divided_a_few_weights_at_a_time(geometry: str, monkeypatch):
    """So that a measurement holds no second copy of all sums; with the same result."""
    options = {"geometries": [geometry], "composite_rest": "adam"}
    model = Regression()
    at_once = steps(model, muon_and_adamw(model), 2, **options)[1]
    taken = []
    whole = SampleSums.over_scales

    def counted(sums: SampleSums, power: float = 1.0) -> Iterator[tuple[list[int], SampleSums]]:
        for weights, scaled in whole(sums, power):
            taken.append(sum(mean.numel() for mean in scaled.means))
            yield weights, scaled

    monkeypatch.setattr(SampleSums, "over_scales", counted)
    monkeypatch.setattr(sample_sums, "ROW_ENTRIES", 24)
    model = Regression()
    in_turn = steps(model, muon_and_adamw(model), 2, **options)[1]
    assert len(taken) > 2
    assert max(taken) <= 24
    totals = [(reading.total.noise, reading.total.signal) for reading in (at_once[0], in_turn[0])]
    assert totals[1] == pytest.approx(totals[0], rel=1e-12)


def test_adam_measures_nothing_of_what_another_rule_trains():
    model = Regression()
    optimizer = muon_and_adamw(model)
    found = steps(model, optimizer, 2, geometries=["adam"])[1]
    gradients = gradients_at(model, 2)
    scales = scales_of(model, optimizer, gradients)
    assert len(scales) == 9  # of eleven weights two are Muon's
    expected = adams_noise_and_signal(gradients, scales, BATCH_SIZE)
    assert found[0].total.noise == pytest.approx(expected["adam", "plug_in"][0], rel=1e-5)


@pytest.mark.parametrize("rest", ["manhattan", "adam"])
@pytest.mark.parametrize("add_up", ["roots", "squares"])
def test_composite_adds_its_parts_up(rest: str, add_up: str):
    model = Regression()
    optimizer = muon_and_adamw(model)
    found = steps(
        model,
        optimizer,
        2,
        geometries=["composite"],
        estimates=["plug_in", "cross_fitted"],
        composite_rest=rest,
        composite_sum=add_up,
        square_root="exact",
    )
    assert len(found[0]) == (0 if rest == "adam" else 2)
    gradients = gradients_at(model, 2)
    scales = scales_of(model, optimizer, gradients)
    lengths = {
        name: ADAMW_LR if name in scales else MUON_LR for name, _ in model.named_parameters()
    }
    expected = composite_noise_and_signal(
        gradients,
        lengths,
        scales if rest == "adam" else {},
        BATCH_SIZE,
        matrices=["layers.0.1.weight", "layers.1.1.weight"],
        squares=add_up == "squares",
    )
    for reading in found[1]:
        numbers = reading.total.noise, reading.total.signal
        assert numbers == pytest.approx(expected["composite", reading.total.estimate], rel=1e-5)


def test_composite_signal_is_what_a_step_gains_to_first_order():
    """With so small a rate that the loss is linear along the step, and matrix signs."""
    torch.set_default_dtype(torch.float64)
    try:
        model = Regression()
        matrices, others = split_parameters(model)
        sign = CombinedOptimizer(
            [
                SpecSGD(matrices, lr=1e-7, matrix_sign="exact"),
                torch.optim.AdamW(others, lr=3e-7, betas=(0.0, 0.9), weight_decay=0.0),
            ]
        )
        readings = steps(model, sign, 2, geometries=["composite"], composite_rest="adam")[1]
        loss = sum(model(**as_double(sample)) for sample in samples(2)) / NUM_SAMPLES
        loss.backward()
        sign.step()
        after = sum(model(**as_double(sample)) for sample in samples(2)) / NUM_SAMPLES
    finally:
        torch.set_default_dtype(torch.float32)
    assert (loss - after).item() == pytest.approx(math.sqrt(readings[0].total.signal), rel=1e-3)


def test_momentum_averages_the_noise_of_each_weight_by_its_own_coefficient():
    options = {"geometries": ["manhattan", "euclidean"], "estimates": ["plug_in", "debiased"]}
    model = Regression()
    plain = steps(model, muon_and_adamw(model), 1, **options)[0]
    model = Regression()
    averaged = steps(model, muon_and_adamw(model), 1, of_momentum=True, **options)[0]
    gradients = gradients_at(Regression(), 1)
    matrices = ("layers.0.1.weight", "layers.1.1.weight")
    shares = {
        n: momentum_noise(0.95, nesterov=True) if n in matrices else 1 / 19 for n in gradients
    }
    by_weight = {n: noise_and_signal({n: g}, (), BATCH_SIZE) for n, g in gradients.items()}
    root = sum(math.sqrt(by_weight[n]["manhattan", "plug_in"][0] * shares[n]) for n in gradients)
    square = sum(by_weight[n]["euclidean", "plug_in"][0] * shares[n] for n in gradients)
    of = {(r.total.geometry, r.total.estimate): r.total for r in averaged}
    before = {(r.total.geometry, r.total.estimate): r.total for r in plain}
    assert of["manhattan", "plug_in"].noise == pytest.approx(root**2, rel=1e-5)
    assert of["euclidean", "plug_in"].noise == pytest.approx(square, rel=1e-5)
    assert of["manhattan", "plug_in"].signal == before["manhattan", "plug_in"].signal
    assert of["euclidean", "plug_in"].signal == before["euclidean", "plug_in"].signal
    # Debiased, the momentum's own noise is taken off.
    signal = before["euclidean", "plug_in"].signal - square / BATCH_SIZE
    assert of["euclidean", "debiased"].signal == pytest.approx(signal, rel=1e-5)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.95, True), (0.0, False)])
def test_momentum_noise_is_the_variance_of_the_step(momentum: float, nesterov: bool):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 20_000, generator=generator)
    m = torch.zeros(20_000)
    for gradient in noise:
        m = momentum * m + gradient
    step = gradient + momentum * m if nesterov else m
    variance = step.var().item() * (1 - momentum) ** 2  # of an average: weights that add up to 1
    assert momentum_noise(momentum, nesterov=nesterov) == pytest.approx(variance, rel=0.04)


def test_norms_alone_are_tapped_and_measured():
    model = Regression()
    meter = NoiseMeter(model, geometries=["euclidean", "manhattan"], parameters="norms")
    names = [tapped.name for tapped in meter.tap.weights]
    assert names == [f"layers.{i}.0.{part}" for i in range(2) for part in ("weight", "bias")]
    with meter.step(1):
        for sample in samples(1):
            with meter.sample():
                (model(**sample) / NUM_SAMPLES).backward()
    gradients = {n: g for n, g in gradients_at(model, 1).items() if n in names}
    expected = noise_and_signal(gradients, (), BATCH_SIZE)
    for reading in meter.read(BATCH_SIZE):
        numbers = reading.total.noise, reading.total.signal
        assert numbers == pytest.approx(expected[reading.total.geometry, "plug_in"], rel=1e-5)


REFUSED = {
    "no optimizer": (None, {"geometries": ["adam"]}, "give it to the meter as optimizer="),
    "momentum of nothing": (None, {"of_momentum": True}, "of_momentum=true reads the optimizer"),
    "no second moments": ("sgd", {"geometries": ["adam"]}, "keep, and this optimizer has none"),
    "one rule for all": ("adamw", {"geometries": ["composite"]}, "of steps along matrix signs"),
    "a rest that is not Adam's": (
        "muon and sgd",
        {"geometries": ["composite"], "composite_rest": "adam"},
        "some weights beside the matrices have none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_optimizer_lacks_is_refused_in_one_line(case: str):
    named, options, message = REFUSED[case]
    model = Regression()
    matrices, others = split_parameters(model)
    optimizer = {
        None: None,
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1),
        "adamw": torch.optim.AdamW(model.parameters()),
        "muon and sgd": CombinedOptimizer([Muon(matrices), torch.optim.SGD(others, lr=0.1)]),
    }[named]
    with pytest.raises(InputError, match=message) as error:
        NoiseMeter(model, optimizer=optimizer, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometries": ["adam"]}, "none of the model's parameters"),
        ({"geometries": ["manhattan"], "of_momentum": True}, "none of the model's parameters"),
    ],
)
def test_an_optimizer_of_another_model_is_refused(options: dict[str, object], message: str):
    optimizer = torch.optim.AdamW(Regression().parameters())
    with pytest.raises(InputError, match=message):
        NoiseMeter(Regression(), optimizer=optimizer, **options)
    with pytest.raises(InputError, match="optimizer=list is no optimizer"):
        NoiseMeter(Regression(), optimizer=optimizer.param_groups, **options)


def test_a_class_that_shows_after_a_step_to_keep_no_second_moments_is_refused():
    model = Regression()
    optimizer = torch.optim.Adamax(model.parameters())
    with pytest.raises(InputError, match="keep, and this optimizer has none"):
        steps(model, optimizer, 2, geometries=["adam"])


class TwoBetas(torch.optim.Optimizer):
    """As Lion: the first beta is of the step, the second of the average."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.99)})


@pytest.mark.parametrize("kind", [TwoBetas, torch.optim.NAdam])
def test_the_noise_of_a_momentum_that_no_beta_says_is_refused(kind: type[torch.optim.Optimizer]):
    model = Regression()
    optimizer = kind(list(model.parameters()))
    with pytest.raises(InputError, match="an average whose weights stay"):
        NoiseMeter(model, optimizer=optimizer, geometries=["manhattan"], of_momentum=True)


def test_a_model_without_norms_cannot_be_measured_by_them():
    with pytest.raises(InputError, match="leaves no weight of this model"):
        NoiseMeter(nn.Linear(3, 3), geometries=["euclidean"], parameters="norms")
