"""One truth: the same micro-batches give the same noise and signal on every layout.

The reference takes every micro-batch's gradient by itself, in float64, and uses exact SVDs.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gns_pretrain.distributed.mesh import ParallelSettings, Place, joined
from gns_pretrain.distributed.noise_meter import NoiseMeter
from gns_pretrain.distributed.sharding import parallelize, unwrapped
from gns_pretrain.distributed.tapped_weights import unsharded_weights
from gns_pretrain.model.llama import Kind, Llama, parameter_kinds
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings, build_adamw
from gns_pretrain.step import accumulate_gradients, train_step
from tests.distributed.harness import run_ranks
from tests.settings import VOCABULARY, odd_model

SAMPLES = 8
SEQUENCES, TOKENS = 1, 6  # of a sample: fewer tokens than every matrix is wide
ALL = NoiseScaleSettings(
    geometries=["euclidean", "manhattan", "nuclear"],
    estimates=["plug_in", "cross_fitted"],
    square_root="exact",
)
Values = dict[tuple[str, str], tuple[float, float]]


def micro_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (SAMPLES, SEQUENCES, TOKENS + 1)
    return list(torch.randint(VOCABULARY, shape, generator=generator))


def model_of(**changes) -> Llama:
    model = Llama(odd_model(**changes))
    model.init_weights(seed=1)
    return model


def measured(place: Place, kind: str, settings: NoiseScaleSettings = ALL, **changes) -> Values:
    """Noise and signal of each geometry and estimate, as one rank of a layout reads them."""
    with joined(place, ParallelSettings(kind=kind), torch.device("cpu")) as world:
        model = parallelize(model_of(**changes), world, compute_dtype=torch.float32)
        optimizer = build_adamw(model, AdamWSettings())
        result = train_step(
            model,
            optimizer,
            micro_batches()[place.rank :: place.num_ranks],
            accumulation=SAMPLES // place.num_ranks,
            max_gradient_norm=1.0,
            batch_size=SAMPLES * SEQUENCES,
            meter=NoiseMeter(model, world, settings),
        )
    return {
        (r.total.geometry, r.total.estimate): (r.total.noise, r.total.signal)
        for r in result.readings
    }


def measured_on_each(place: Place, kinds: tuple[str, ...]) -> list[Values]:
    return [
        measured(replace(place, rendezvous=f"{place.rendezvous}-{kind}"), kind) for kind in kinds
    ]


def sample_gradients(**changes) -> dict[str, Tensor]:
    """Every sample's own gradient of every weight, [R, ...] in float64."""
    model = model_of(**changes).double()
    model.compute_dtype = torch.float64
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sequences in micro_batches():
        model(sequences[:, :-1], sequences[:, 1:]).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            gradients[name].append(weight.grad)
            weight.grad = None
    return {name: torch.stack(samples) for name, samples in gradients.items()}


def dense_reference(**changes) -> Values:
    """The equations as they stand, on whole gradients."""
    gradients = sample_gradients(**changes)
    kinds = parameter_kinds(model_of(**changes))
    batch, count = SAMPLES * SEQUENCES, SAMPLES
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    mean = flat.mean(0)
    variance = batch / (count - 1) * (flat.square().mean(0) - mean.square()).clamp_min(0)
    even, odd = flat[0::2].mean(0), flat[1::2].mean(0)
    euclidean_gain = (even @ odd) * (1 / even.norm() + 1 / odd.norm()) / 2
    manhattan_gain = (even @ odd.sign() + odd @ even.sign()) / 2
    root = norm = nuclear_gain = 0.0
    for name, samples in gradients.items():
        if kinds[name] not in (Kind.ATTENTION, Kind.FEED_FORWARD):
            continue
        deviations = samples - samples.mean(0)
        # tr C^(1/2) is the sum of the singular values of all deviations side by side.
        wide = deviations if samples.shape[1] <= samples.shape[2] else deviations.mT
        stacked = torch.cat(list(wide), dim=1) * (batch / (count - 1) / count) ** 0.5
        root += torch.linalg.svdvals(stacked).sum().item()
        norm += torch.linalg.svdvals(samples.mean(0)).sum().item()
        first, second = samples[0::2].mean(0), samples[1::2].mean(0)
        nuclear_gain += 0.5 * ((first * polar(second)).sum() + (second * polar(first)).sum()).item()

    def signed_square(gain: float) -> float:
        return gain * abs(gain)

    return {
        ("euclidean", "plug_in"): (variance.sum().item(), mean.square().sum().item()),
        ("euclidean", "cross_fitted"): (
            variance.sum().item(),
            signed_square(euclidean_gain.item()),
        ),
        ("manhattan", "plug_in"): (
            variance.sqrt().sum().item() ** 2,
            mean.abs().sum().item() ** 2,
        ),
        ("manhattan", "cross_fitted"): (
            variance.sqrt().sum().item() ** 2,
            signed_square(manhattan_gain.item()),
        ),
        ("nuclear", "plug_in"): (root**2, norm**2),
        ("nuclear", "cross_fitted"): (root**2, signed_square(nuclear_gain)),
    }


def polar(matrix: Tensor) -> Tensor:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-5 * values[0]
    return u[:, kept] @ v[kept]


def assert_equal(found: Values, expected: Values, where: str) -> None:
    assert found.keys() == expected.keys()
    for key, (noise, signal) in expected.items():
        rel = 1e-4 if key[0] == "nuclear" else 1e-5
        assert found[key][0] == pytest.approx(noise, rel=rel), f"noise of {key} on {where}"
        assert found[key][1] == pytest.approx(signal, rel=rel), f"signal of {key} on {where}"


@pytest.fixture(scope="module")
def reference() -> Values:
    return dense_reference()


def test_one_process_equals_the_dense_reference(reference):
    assert_equal(measured(Place(), "single"), reference, "one process")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_layout_equals_the_dense_reference(num_ranks, reference, tmp_path):
    kinds = ("ddp", "fsdp", "hsdp")
    for rank, each in enumerate(run_ranks(num_ranks, measured_on_each, tmp_path, kinds)):
        for kind, found in zip(kinds, each, strict=True):
            assert_equal(found, reference, f"{kind}, rank {rank} of {num_ranks}")


def test_tied_embeddings_are_one_weight():
    found = measured(Place(), "single", tie_embeddings=True)
    assert_equal(found, dense_reference(tie_embeddings=True), "one process, tied")


def test_activation_checkpointing_shows_each_gradient_once(reference):
    found = measured(Place(), "single", activation_checkpointing=True)
    assert_equal(found, reference, "one process, checkpointed")


def memory_of_a_measurement(place: Place) -> tuple[list[int], list[int], int]:
    """Elements of sharded squares and signed sums, of Grams by weight, and of all weights."""
    with joined(place, ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        model = parallelize(model_of(), world, compute_dtype=torch.float32)
        meter = NoiseMeter(model, world, ALL)
        with meter.armed(1):
            accumulate_gradients(
                model, micro_batches()[place.rank : place.rank + 1], accumulation=1, meter=meter
            )
            sums = meter.tap.sums()
        rows = [sum(t.numel() for t in kind) for kind in (sums.squares, sums.signed)]
        return rows, sorted(sums.grams), sum(w.shape.numel() for w in meter.tap.weights)


def test_sums_stay_sharded_and_every_gram_has_one_owner(tmp_path):
    num_ranks = 4
    results = run_ranks(num_ranks, memory_of_a_measurement, tmp_path)
    matrices = 2 * 7
    assert sorted(i for _, grams, _ in results for i in grams) == sorted(
        i
        for i, kind in enumerate(parameter_kinds(model_of()).values())
        if kind in (Kind.ATTENTION, Kind.FEED_FORWARD)
    )
    for rows, grams, parameters in results:
        # P / R and the padding of rows that 4 ranks do not divide: at most 3 rows a weight.
        padding = sum(3 * p.shape[1:].numel() for p in model_of().parameters())
        assert all(count <= (parameters + padding) / num_ranks for count in rows)
        assert len(grams) <= -(-matrices // num_ranks)


def unsharded_objects(place: Place) -> bool:
    """Whether FSDP2 shows autograd the same tensors after it has sharded and gathered again."""
    with joined(place, ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        model = parallelize(model_of(), world, compute_dtype=torch.float32)
        before = unsharded_weights(unwrapped(model))
        tokens = micro_batches()[0]
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        after = unsharded_weights(unwrapped(model))
        return all(before[name] is after[name] for name in before)


def test_unsharded_weights_stay_the_same_objects(tmp_path):
    assert run_ranks(2, unsharded_objects, tmp_path) == [True, True]
