"""How exact the noise scale of models that are not ours is, on every layout.

python -m tests.distributed.exactness    the tables of docs/noise_scale.md, in Markdown

A number is the largest relative difference of noise and signal, over all estimates of a geometry,
to a dense float64 reference by torch.func's gradient of every sample.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.model.roles import matrix_shape, transposed_weights
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.optim import CombinedOptimizer, Muon, split_parameters
from gns_pretrain.parallel.mesh import RankInfo
from tests.dense_reference import (
    Batch,
    Values,
    adams_noise_and_signal,
    composite_noise_and_signal,
    looped_sample_gradients,
    noise_and_signal,
    sample_gradients,
)
from tests.distributed.harness import CONTEXT, PRELOAD, run_ranks
from tests.foreign_models import FOREIGN_MODELS, ForeignModel

CONTEXT.set_forkserver_preload([*PRELOAD, "tests.foreign_models"])  # transformers takes seconds

NUM_RANKS = 4
NUM_SAMPLES = 8
GEOMETRIES = ["euclidean", "manhattan", "nuclear", "adam", "composite"]
ESTIMATES = ["plug_in", "debiased", "cross_fitted", "nested"]
# Of the optimizer that `adam` and `composite` read; it takes no step.
MUON_LR, ADAMW_LR, BETAS, STEPS = 0.02, 0.01, (0.9, 0.95), 10
LAYOUTS = ("one process", "DDP", "FSDP2", "FSDP2, root only", "HSDP", "FSDP2 + tensor")


@dataclass(frozen=True)
class Case:
    """A model on a layout, and what else its loop does."""

    model: str
    layout: str
    variant: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.model, self.layout, self.variant)))

    @property
    def foreign(self) -> ForeignModel:
        return FOREIGN_MODELS[self.model]


PLAIN = [
    Case(model, layout)
    for model, foreign in FOREIGN_MODELS.items()
    for layout in LAYOUTS
    if layout != "FSDP2 + tensor" or foreign.tensor_plan
]
VARIANTS = [
    Case("MLP", "one process", "compiled whole"),
    Case("GPT-2", "one process", "compiled by block"),
    Case("GPT-2", "one process", "autocast to bfloat16"),
    Case("GPT-2", "DDP", "reduced at each micro-batch"),
    Case("Llama", "FSDP2", "transformers' checkpointing"),
    Case("Llama", "FSDP2", "bfloat16 copies"),
    Case("ViT", "HSDP", "torch's checkpointing"),
    Case("MLP", "FSDP2 + tensor", "reduced at each micro-batch"),
]
# Compiling takes half a minute on each rank, so these are in the tables and not in the tests.
SLOW = [
    Case("Llama", "one process", "compiled whole"),
    Case("Llama", "FSDP2", "compiled by block"),
]


@dataclass(frozen=True)
class Measured:
    """What one rank found in one step."""

    values: Values
    same_bits: bool  # whether the step left the weights and buffers of one that is not measured


def varied(model: nn.Module, foreign: ForeignModel, variant: str) -> nn.Module:
    """A model with a variant's change, as a loop makes it before parallelizing."""
    if variant == "compiled by block":
        for block in foreign.units(model):
            block.compile(backend="aot_eager")
    elif variant == "transformers' checkpointing":
        model.gradient_checkpointing_enable()
    elif variant == "torch's checkpointing":
        layers = model.vit.layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
    return model


def parallelized(case: Case) -> tuple[nn.Module, int, int]:
    """The model, and this rank's place among those that see different samples, and their number."""
    foreign, layout = case.foreign, case.layout
    model = varied(foreign.new(), foreign, case.variant)
    if case.variant == "compiled whole":
        model = torch.compile(model, backend="aot_eager")
    if layout == "one process":
        return model, 0, 1
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if layout == "DDP":
        unused = case.model == "MLP"
        return DistributedDataParallel(model, find_unused_parameters=unused), rank, ranks
    mesh: DeviceMesh
    if layout == "FSDP2 + tensor":
        both = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        plan = {name: style() for name, style in foreign.tensor_plan.items()}
        parallelize_module(model, both["tensor"], plan)
        mesh = both["data"]
    elif layout == "HSDP":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (ranks,))
    options = {}
    if case.variant == "bfloat16 copies":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mp_policy": policy}
    if layout != "FSDP2, root only":
        for unit in foreign.units(model):
            fully_shard(unit, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    data_ranks = mesh.size()
    return model, rank * data_ranks // ranks, data_ranks


@contextmanager
def accumulating(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Reduce gradients after the last micro-batch alone, as loops do."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    if isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    yield


def meter_of(model: nn.Module, *, every_steps: int = 1) -> NoiseMeter:
    """Of every geometry, with an optimizer to read."""
    matrices, others = split_parameters(model)
    optimizer = CombinedOptimizer(
        [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(others, lr=ADAMW_LR, betas=BETAS)]
    )
    for weight in others:
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": second_moment(weight)}
        optimizer.state[weight] = {"step": torch.tensor(float(STEPS)), **moments}
    return NoiseMeter(
        model,
        geometries=GEOMETRIES,
        estimates=ESTIMATES,
        square_root="exact",
        every_steps=every_steps,
        composite_rest="adam",
        optimizer=optimizer,
    )


def loss_of(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def trained(case: Case, *, measured: bool) -> tuple[Values, list[Tensor]]:
    """One step of SGD: noise and signal, and the weights and buffers that it leaves."""
    model, place, count = parallelized(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = case.foreign.samples(NUM_SAMPLES)[place::count]
    meter = meter_of(model, every_steps=1 if measured else 100)
    each = case.variant == "reduced at each micro-batch"
    autocast = case.variant == "autocast to bfloat16"
    with meter.step(2):
        for i, micro_batch in enumerate(batch, 1):
            with accumulating(model, each or i == len(batch)), meter.sample():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model(**micro_batch))
                (loss / len(batch)).backward()
    readings = meter.read(batch_size=NUM_SAMPLES * case.foreign.sample_size)
    optimizer.step()
    left = [t.to_local() if isinstance(t, DTensor) else t for t in model.state_dict().values()]
    return values_of(readings), [t.detach().clone() for t in left]


def values_of(readings: list[Reading]) -> Values:
    totals = [reading.total for reading in readings]
    return {(t.geometry, t.estimate): t.gains or (t.noise, t.signal) for t in totals}


def measure(case: Case) -> Measured:
    values, left = trained(case, measured=True)
    nothing, plain = trained(case, measured=False)
    assert not nothing
    return Measured(values, all(map(torch.equal, left, plain)))


def measured_on_rank(place: RankInfo, cases: list[Case]) -> dict[Case, Measured]:
    """Each case, in one start of the ranks."""
    dist.init_process_group(
        "gloo", init_method=place.rendezvous, rank=place.rank, world_size=place.num_ranks
    )
    found = {case: measure(case) for case in cases}
    dist.destroy_process_group()
    return found


def measure_all(cases: list[Case], folder: Path) -> list[tuple[Case, Measured]]:
    """Each case; of those on several ranks, what each of them found."""
    alone = [case for case in cases if case.layout == "one process"]
    together = [case for case in cases if case not in alone]
    of_ranks = run_ranks(NUM_RANKS, measured_on_rank, folder, together)
    several = [pair for of_rank in of_ranks for pair in of_rank.items()]
    return [(case, measure(case)) for case in alone] + several


def dense(foreign: ForeignModel) -> Values:
    """The reference: float64; batch norm by the statistics of a micro-batch."""
    model = foreign.new().double()
    # Not the running ones, which vmap cannot update; they have no part in training's gradients.
    torch.func.replace_all_batch_norm_modules_(model)
    return reference(foreign, model, sample_gradients, as_double)


def dense_of(case: Case) -> Values:
    """The reference of a case; where it computes in bfloat16, of gradients by autograd in it."""
    if "bfloat16" not in case.variant:
        return dense(case.foreign)
    model = case.foreign.new()
    if case.variant == "bfloat16 copies":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
        return reference(case.foreign, model, looped_sample_gradients)
    with torch.autocast("cpu", torch.bfloat16):
        return reference(case.foreign, model, looped_sample_gradients)


def reference(
    foreign: ForeignModel,
    model: nn.Module,
    gradients_of: Callable[..., dict[str, Tensor]],
    converted: Callable[[Batch], Batch] = dict,
) -> Values:
    samples = [converted(sample) for sample in foreign.samples(NUM_SAMPLES)]
    gradients = gradients_of(model, samples, loss_of)
    batch_size = NUM_SAMPLES * foreign.sample_size
    values = noise_and_signal(gradients, foreign.matrix_names(model), batch_size)
    weights = dict(foreign.new().double().named_parameters())
    beta2, scales = BETAS[1], {}
    for name in gradients.keys() - set(foreign.matrix_names(model)):
        square = gradients[name].double().mean(0).square()
        v = beta2 * second_moment(weights[name]) + (1 - beta2) * square
        scales[name] = (v / (1 - beta2 ** (STEPS + 1))).sqrt() + 1e-8
    transposed = transposed_weights(model)
    lengths = {}
    for name, gradient in gradients.items():
        rows, columns = matrix_shape(gradient[0])
        rows, columns = (columns, rows) if name in transposed else (rows, columns)
        of_matrix = MUON_LR * math.sqrt(max(1.0, rows / columns))
        lengths[name] = ADAMW_LR if name in scales else of_matrix
    values |= adams_noise_and_signal(gradients, scales, batch_size)
    return values | composite_noise_and_signal(
        gradients, lengths, scales, batch_size, matrices=foreign.matrix_names(model)
    )


def second_moment(weight: Tensor) -> Tensor:
    """Adam's v of a weight, which is its shard where the weight is one."""
    return weight.detach().square() + 0.1


def as_double(sample: Batch) -> Batch:
    return {key: t.double() if t.is_floating_point() else t for key, t in sample.items()}


def largest_difference(found: Values, expected: Values, geometry: str) -> float:
    """The largest relative difference of noise and signal over a geometry's estimates.

    Debiased and cross-fitted signals and nested gains are differences of terms of the plug-in one's
    size, which may cancel; theirs is relative to it.
    """
    assert found.keys() == expected.keys()
    noise, signal = expected[geometry, "plug_in"]
    return max(
        abs(ours - its) / size
        for key in expected
        if key[0] == geometry
        for ours, its, size in zip(
            found[key],
            expected[key],
            (signal**0.5,) * 3 if key[1] == "nested" else (noise, signal),
            strict=True,
        )
    )


def differences(cases: list[Case], folder: Path) -> dict[tuple[Case, str], float]:
    """By case and geometry; of several ranks, the largest."""
    worst: dict[tuple[Case, str], float] = {}
    for case, measured in measure_all(cases, folder):
        expected = dense_of(case)
        for geometry in GEOMETRIES:
            difference = largest_difference(measured.values, expected, geometry)
            worst[case, geometry] = max(worst.get((case, geometry), 0.0), difference)
    return worst


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        worst = differences([*PLAIN, *VARIANTS, *SLOW], Path(folder))

    def row(*cells: str) -> None:
        sys.stdout.write(f"| {' | '.join(cells)} |\n")

    def difference(case: Case, geometry: str) -> str:
        return f"{worst[case, geometry]:.1e}" if (case, geometry) in worst else "-"

    row("model", "geometry", *LAYOUTS)
    row(*["---"] * (2 + len(LAYOUTS)))
    for model in FOREIGN_MODELS:
        for geometry in GEOMETRIES:
            row(model, geometry, *(difference(Case(model, layout), geometry) for layout in LAYOUTS))
    sys.stdout.write("\n")
    row("variant", "model", "layout", *GEOMETRIES)
    row(*["---"] * (3 + len(GEOMETRIES)))
    for case in VARIANTS + SLOW:
        cells = (difference(case, geometry) for geometry in GEOMETRIES)
        row(case.variant, case.model, case.layout, *cells)


if __name__ == "__main__":
    from tests.distributed import exactness  # ranks find its functions under this name

    exactness.main()
