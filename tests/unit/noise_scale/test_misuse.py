"""The meter in a stranger's loop: what it needs, and what it does where the loop is wrong."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading

GEOMETRIES = ["euclidean", "manhattan", "nuclear"]
SAMPLES = 4


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(3, 5), *layers, nn.Linear(5, 2))


def batch() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(SAMPLES)
    ]


def loss_of(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(sample[0]), sample[1]) / SAMPLES


def meter_of(model: nn.Module, **options) -> NoiseMeter:
    return NoiseMeter(model, geometries=GEOMETRIES, square_root="exact", **options)


def measured(model: nn.Module, meter: NoiseMeter, scale: float = 1.0) -> None:
    with meter.step(1):
        for sample in batch():
            with meter.sample():
                (scale * loss_of(model, sample)).backward()


def totals(readings: list[Reading]) -> list[tuple[str, float, float]]:
    return [(r.total.geometry, r.total.noise, r.total.signal) for r in readings]


def test_first_step_and_every_f_th_are_measured_and_the_others_read_nothing():
    model = model_of()
    meter = meter_of(model, every_steps=3)
    read = []
    for step in range(1, 8):
        with meter.step(step):
            for sample in batch():
                with meter.sample():
                    loss_of(model, sample).backward()
        read.append(len(meter.read(batch_size=16)))
        model.zero_grad()
    assert read == [3, 0, 3, 0, 0, 3, 0]


def test_reading_is_that_of_the_samples_whatever_their_number():
    model = model_of()
    meter = meter_of(model)
    measured(model, meter)
    (euclidean, *_) = meter.read(batch_size=16)
    assert euclidean.total.num_samples == SAMPLES
    each = []
    for sample in batch():
        model.zero_grad()
        (SAMPLES * loss_of(model, sample)).backward()
        each.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    gradients = torch.stack(each)
    assert euclidean.total.noise == pytest.approx(4 * gradients.var(0).sum().item(), rel=1e-5)
    assert euclidean.total.signal == pytest.approx(gradients.mean(0).square().sum().item(), 1e-5)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def drop(model: nn.Module) -> None:
    model.zero_grad()


def add_more(model: nn.Module) -> None:
    loss_of(model, batch()[0]).backward()


def clip_a_little(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad *= 0.95


def forget_one_matrix(model: nn.Module) -> None:
    model[1][0].weight.grad *= 2


@pytest.mark.parametrize("spoil", [clip, clip_a_little, drop, add_more, forget_one_matrix])
def test_gradient_that_is_not_the_mean_of_the_samples_is_an_error(spoil):
    model = model_of()
    meter = meter_of(model)
    measured(model, meter)
    spoil(model)
    with pytest.raises(InputError, match=r"\.grad differs from the mean of the measured samples"):
        meter.read(batch_size=16)


def test_gradients_of_the_step_before_are_an_error():
    model = model_of()
    meter = meter_of(model)
    loss_of(model, batch()[0]).backward()
    measured(model, meter)
    with pytest.raises(InputError, match=r"\.grad differs .*zero the gradients"):
        meter.read(batch_size=16)


def test_backward_pass_outside_a_sample_is_an_error():
    model = model_of()
    meter = meter_of(model)
    with pytest.raises(InputError, match=r"ran outside meter\.sample"), meter.step(1):
        loss_of(model, batch()[0]).backward()
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_second_backward_pass_in_a_sample_is_an_error():
    model = model_of()
    meter = meter_of(model)
    first, second = batch()[:2]
    with meter.step(1), meter.sample():
        loss_of(model, first).backward()
        with pytest.raises(InputError, match="got a second gradient in one sample"):
            loss_of(model, second).backward()


def test_sample_within_a_sample_is_an_error():
    meter = meter_of(model_of())
    with meter.step(1), meter.sample(), pytest.raises(InputError, match="begun within another"):
        meter.sample().__enter__()


def test_single_sample_is_an_error_of_the_reading():
    model = model_of()
    meter = meter_of(model)
    with meter.step(1), meter.sample():
        loss_of(model, batch()[0]).backward()
    with pytest.raises(InputError, match="num_samples=1"):
        meter.read(batch_size=4)


def test_measurement_after_a_failed_one_is_as_if_it_had_not_been():
    model = model_of()
    meter = meter_of(model)

    def fail() -> None:
        with meter.step(1), meter.sample():
            loss_of(model, batch()[0]).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert meter.read(batch_size=16) == []
    model.zero_grad()
    measured(model, meter)
    found = totals(meter.read(batch_size=16))
    fresh = model_of()
    again = meter_of(fresh)
    measured(fresh, again)
    assert found == totals(again.read(batch_size=16))


def test_scaled_loss_is_divided_out_and_an_unscaled_gradient_is_refused():
    model = model_of()
    meter = meter_of(model)
    measured(model, meter)
    expected = totals(meter.read(batch_size=16))
    model.zero_grad()
    measured(model, meter, scale=1024.0)
    assert totals(meter.read(batch_size=16, loss_scale=1024.0)) == expected  # a power of two
    model.zero_grad()
    measured(model, meter, scale=1024.0)
    for weight in model.parameters():
        weight.grad /= 1024.0  # as GradScaler.unscale_ does
    with pytest.raises(InputError, match="unscaling"):
        meter.read(batch_size=16, loss_scale=1024.0)


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="no trainable parameter"):
        meter_of(model_of().requires_grad_(False))


def test_blocks_are_reduced_in_the_order_of_the_backward_pass_once_it_is_known():
    class Backwards(nn.Module):
        """Registered in the reverse of the order in which it computes."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(3, 3) for _ in range(3))
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model = Backwards()
    meter = meter_of(model)
    names = [tapped.name for tapped in meter.tap.weights]
    orders, found = [], []
    for _ in range(2):
        with meter.step(1):
            for x, _ in batch():
                with meter.sample():
                    (model(x).square().mean() / SAMPLES).backward()
        orders.append([{names[i].split(".")[0] for i in members} for members in meter.tap.blocks])
        found.append(totals(meter.read(batch_size=16)))
        model.zero_grad()
    assert orders[1] == [{"last"}, {"middle"}, {"first"}, {"unused"}]
    assert found[0] == found[1]


def test_convolution_is_measured_as_a_matrix_of_its_outputs():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 2)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(16, 2))
    flat = copy.deepcopy(model)
    flat[0] = nn.Linear(12, 4)
    flat[0].weight.data = convolution.weight.data.flatten(1).clone()
    flat[0].bias.data = convolution.bias.data.clone()
    images = torch.randn(SAMPLES, 2, 3, 3, 3)

    def as_matrix(x: Tensor) -> Tensor:
        patches = F.unfold(x, 2).mT  # [n, places, 12]
        return flat[2](F.linear(patches, flat[0].weight, flat[0].bias).mT.flatten(1))

    found = []
    for net, forward in ((model, model), (flat, as_matrix)):
        meter = meter_of(net, matrices=["0.weight"])
        with meter.step(1):
            for x in images:
                with meter.sample():
                    (forward(x).square().mean() / SAMPLES).backward()
        found.append(totals(meter.read(batch_size=8)))
    for (name, *numbers), (_, *expected) in zip(*found, strict=True):
        assert numbers == pytest.approx(expected, rel=1e-5), name


def replace_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replace_head(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 2)


def append_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def assign_state(model: nn.Sequential) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def freeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


@pytest.mark.parametrize(
    "change", [replace_weight, replace_head, append_layer, assign_state, freeze]
)
def test_parameters_that_are_no_longer_those_of_the_meter_are_an_error(change):
    model = model_of()
    meter = meter_of(model, every_steps=2)
    change(model)
    with meter.step(3):
        pass  # unmeasured
    with pytest.raises(InputError, match=r"\d\.(0\.)?weight is not the trainable parameter"):
        measured(model, meter)


def test_weight_that_is_unfrozen_later_is_an_error():
    model = model_of()
    model[0].requires_grad_(False)
    meter = meter_of(model)
    model[0].requires_grad_(True)
    with pytest.raises(InputError, match=r"0\.weight is not the trainable parameter"):
        measured(model, meter)


@pytest.mark.parametrize("batch_size", [0, -4, 7, 8.0, "8"])
def test_batch_size_that_samples_of_one_size_cannot_make_is_an_error(batch_size):
    model = model_of()
    meter = meter_of(model)
    measured(model, meter)
    with pytest.raises(InputError, match=f"batch_size={batch_size} is not a multiple of the 4"):
        meter.read(batch_size=batch_size)


def test_sparse_gradient_is_an_error_that_names_the_weight():
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2))
    meter = meter_of(model, matrices=["1.weight"])
    with meter.step(1), meter.sample(), pytest.raises(InputError, match=r"0\.weight has a sparse"):
        model(torch.tensor([1, 2])).square().mean().backward()


def test_scalar_parameter_is_measured():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model = Scaled()
    meter = NoiseMeter(model, geometries=["manhattan"])
    with meter.step(1):
        for x in (1.0, 4.0):
            with meter.sample():
                (model(torch.tensor(x)) / 2).backward()
    (reading,) = meter.read(batch_size=2)
    # Gradients 1 and 4: variance 4.5, mean 2.5.
    assert reading.total.noise == pytest.approx(4.5)
    assert reading.total.signal == pytest.approx(6.25)


def test_options_that_cannot_be_are_errors():
    model = model_of()
    with pytest.raises(InputError, match=r"use a list: \[manhattan\]"):
        NoiseMeter(model, geometries="manhattan")
    with pytest.raises(InputError, match="steps count from 1"):
        meter_of(model).step(0)
