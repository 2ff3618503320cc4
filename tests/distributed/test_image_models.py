"""SimpleViT and ResNet: noise scales, statistics and weights are one process's on every layout.

The reference takes the gradient of every micro-batch by itself, in float64, and uses exact SVDs. A
micro-batch is one sample of it: BatchNorm normalises each by its own statistics.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gns_pretrain.model.classifier import ImageClassifier
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.roles import Role, clean_name, parameter_roles
from gns_pretrain.model.simple_vit import SimpleViTConfig
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.parallel.running_statistics import update_running_statistics
from gns_pretrain.parallel.sharding import gradient_synchronisation, local_shards, parallelize
from tests.dense_reference import Values, looped_sample_gradients, noise_and_signal
from tests.distributed.exactness import ESTIMATES, largest_difference, values_of
from tests.distributed.harness import run_ranks

# Widths that neither 2 nor 3 ranks divide; 5 classes.
CONFIGS = {
    "SimpleViT": SimpleViTConfig("v", patch_size=4, dim=20, num_layers=2, num_heads=2, ffn_dim=26),
    "ResNet": ResNetConfig("r", width=5, blocks_per_stage=[1, 1, 1]),
}
GEOMETRIES = ["euclidean", "manhattan", "nuclear"]
ALL = NoiseScaleSettings(geometries=GEOMETRIES, estimates=ESTIMATES, square_root="exact")
SAMPLES, SIZE = 12, 4  # micro-batches of a step, and images of each
# float32 rounds a sum of 12 sample gradients by about 12 * 6e-8 = 7e-7 of its size.
RELATIVE = 1e-6


@dataclass(frozen=True)
class Case:
    """A model and how it is laid over ranks."""

    model: str
    kind: str = "single"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Step:
    """What one rank has after a step."""

    values: Values
    loss: float  # of this rank's micro-batches
    # After it, by name: this rank's shards, buffers, and logits of images that no step has seen.
    left: dict[str, np.ndarray]

    @property
    def everywhere(self) -> dict[str, np.ndarray]:
        """What is the same on every layout."""
        return {name: array for name, array in self.left.items() if not name.startswith("shard ")}


def new_model(name: str) -> ImageClassifier:
    model = CONFIGS[name].build(image_shape=(3, 8, 8), num_classes=5)
    model.init_weights(seed=1)
    # SimpleViT's head begins at zero, and the blocks without a gradient.
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def samples(count: int = SAMPLES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (count, SIZE), generator=generator)
    noise = torch.randn(count, SIZE, 3, 8, 8, generator=generator)
    # Those of a class look alike, so that the gradients agree on something.
    images = noise + labels[..., None, None, None]
    return [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def one_step(place: RankInfo, case: Case, *, measured: bool = True) -> Step:
    """One step of SGD over this rank's micro-batches, then logits in evaluation."""
    with joined(place, ParallelSettings(kind=case.kind), torch.device("cpu")) as world:
        model = parallelize(new_model(case.model), world, compute_dtype=case.dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, ALL)
        ours = samples()[place.rank :: place.num_ranks]
        losses = []
        with meter.step(1) if measured else meter.step(2):
            for index, sample in enumerate(ours, 1):
                with meter.sample(), gradient_synchronisation(model, index == len(ours)):
                    loss = model(**sample)
                    (loss / len(ours)).backward()
                losses.append(loss.item())
        readings = meter.read(SAMPLES * SIZE)
        optimizer.step()
        update_running_statistics(model)
        shards = local_shards(model.parameters())
        left = {f"shard {number}": shard.detach() for number, shard in enumerate(shards)}
        left |= {clean_name(name): buffer for name, buffer in model.named_buffers()}
        model.eval()
        with torch.no_grad():
            left["logits"] = model(samples(SAMPLES + 1)[-1]["images"])
        return Step(
            values=values_of(readings),
            loss=sum(losses) / len(losses),
            left={name: tensor.numpy().copy() for name, tensor in left.items()},
        )


def each_step(place: RankInfo, cases: list[Case]) -> list[tuple[Step, bool]]:
    """Each case, and whether a step that is not measured leaves the same bits."""
    found = []
    for number, case in enumerate(cases):
        step, plain = (
            one_step(
                replace(place, rendezvous=f"{place.rendezvous}-{number}-{measured}"),
                case,
                measured=measured,
            )
            for measured in (True, False)
        )
        assert not plain.values
        same = [np.array_equal(array, plain.left[name]) for name, array in step.left.items()]
        found.append((step, all(same)))
    return found


def dense(name: str) -> Values:
    """The equations as they stand, on whole gradients in float64."""
    model = new_model(name).double()
    doubled = [{**sample, "images": sample["images"].double()} for sample in samples()]
    gradients = looped_sample_gradients(model, doubled, lambda loss: loss)
    matrices = [n for n, role in parameter_roles(model).items() if role is Role.MATRIX]
    return noise_and_signal(gradients, matrices, SAMPLES * SIZE)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Step, Values]]:
    """Of each model, the step of one process and the reference."""
    return {name: (one_step(RankInfo(), Case(name)), dense(name)) for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_process_equals_the_dense_reference(alone, name):
    step, expected = alone[name]
    for geometry in GEOMETRIES:
        assert largest_difference(step.values, expected, geometry) < RELATIVE, geometry


@pytest.mark.parametrize(("num_ranks", "kinds"), [(3, ("fsdp", "ddp")), (4, ("hsdp",))])
def test_every_layout_equals_one_process_and_the_dense_reference(alone, num_ranks, kinds, tmp_path):
    cases = [Case(name, kind) for name in CONFIGS for kind in kinds]
    low = [Case(name, kinds[0], torch.bfloat16) for name in CONFIGS]
    of_ranks = run_ranks(num_ranks, each_step, tmp_path, cases + low)
    for number, case in enumerate(cases):
        step, expected = alone[case.model]
        found = [of_rank[number][0] for of_rank in of_ranks]
        assert sum(f.loss for f in found) / num_ranks == pytest.approx(step.loss, rel=1e-6)
        for rank, ours in enumerate(found):
            where = f"{case}, rank {rank} of {num_ranks}"
            for geometry in GEOMETRIES:
                difference = largest_difference(ours.values, expected, geometry)
                assert difference < RELATIVE, f"{geometry}: {where}"
            assert ours.everywhere.keys() == step.everywhere.keys()
            for name, array in ours.everywhere.items():
                np.testing.assert_allclose(
                    array, step.left[name], rtol=1e-4, atol=1e-5, err_msg=f"{name}: {where}"
                )
    for of_rank in of_ranks:
        assert all(same_bits for _, same_bits in of_rank)
