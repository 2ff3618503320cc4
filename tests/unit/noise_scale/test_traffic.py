"""What a measured step adds to a plain one: collectives, operations, and waits for the device.

As one rank of eight over torch's fake process group, whose collectives send nothing.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale import geometries as module
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import train_step
from tests.settings import VOCABULARY, odd_model

RANKS, LAYERS, BLOCKS = 8, 4, 4 + 3  # the layers, embedding, last norm and output
SHAPES = {"fsdp": {"shard": 8}, "hsdp": {"replica": 2, "shard": 4}}
EVERYTHING = {
    "geometries": ["euclidean", "manhattan", "nuclear"],
    "estimates": ["plug_in", "cross_fitted"],
    "square_root": "iterative",
}


class Operations(TorchDispatchMode):
    """How often each operation runs in the block, by its name; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        if not (function.is_view or "empty" in name or name.startswith("profiler")):
            self.counts[name] += 1
        return function(*arguments, **(keywords or {}))


@contextmanager
def rank_of_eight(kind: str, **changes: int) -> Iterator[nn.Module]:
    """The odd model, parallelized, on a rank that hears nothing of the others."""
    # DTensor keeps the meshes of operations that other tests have run, whose groups are gone.
    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(debug, name, lambda: None)()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        sizes = SHAPES[kind]
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        model = Llama(odd_model(num_layers=LAYERS, **changes))
        model.init_weights(seed=0)
        world = World(0, RANKS, torch.device("cpu"), kind, mesh)
        yield parallelize(model, world, compute_dtype=torch.bfloat16)
    finally:
        dist.destroy_process_group()


def operations_of_a_step(model: nn.Module, meter: NoiseMeter | None) -> Counter[str]:
    batch = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Operations() as operations:
        train_step(
            model,
            optimizer,
            [inputs_and_targets(batch)],
            accumulation=1,
            gradient_clip=1.0,
            batch_size=RANKS,
            meter=meter,
        )
    return operations.counts


def added_by_measuring(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, **settings
) -> Counter[str]:
    # Nothing arrives from other ranks, so that the mean gradient is not that of the samples.
    monkeypatch.setattr(NoiseMeter, "_check_agreement", lambda self, squares: None)
    meter = NoiseMeter(model, **settings)
    operations_of_a_step(model, meter)  # which also learns the order of the blocks
    measured = operations_of_a_step(model, meter)
    return measured - operations_of_a_step(model, None)


def number_of(kind: str, counts: Counter[str]) -> int:
    return sum(n for name, n in counts.items() if name.startswith("c10d::") and kind in name)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_block_sends_all_that_it_has_in_few_collectives(monkeypatch, kind):
    with rank_of_eight(kind) as model:
        added = added_by_measuring(monkeypatch, model, **EVERYTHING)
    # Squares and signed sums together; a block of 7 matrices has 2 owners at most.
    assert number_of("reduce_scatter", added) == BLOCKS
    assert number_of("reduce_", added) - BLOCKS <= LAYERS + RANKS - 1
    # The check of the mean gradient, the table, and what replicas have of the rows.
    assert number_of("allreduce", added) == (3 if kind == "hsdp" else 2)
    assert number_of("alltoall", added) == 2


def test_measured_step_adds_few_operations_to_each_block(monkeypatch):
    with rank_of_eight("fsdp") as model:
        counts = added_by_measuring(
            monkeypatch, model, geometries=["euclidean", "manhattan"], estimates=["plug_in"]
        )
    # By block, not by weight: of those each layer has 9. torch 2.13 makes 129 of it, 2.15 143.
    assert counts.total() <= 14 * BLOCKS + 45


def test_host_waits_twice_for_a_nuclear_measurement(monkeypatch):
    model = Llama(odd_model())
    model.init_weights(seed=0)
    meter = NoiseMeter(model, geometries=["nuclear"], square_root="iterative")
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 1)  # each root by itself
    waits: list[str] = []
    for name in ("tolist", "cpu", "item", "nonzero", "__bool__", "__index__"):
        real = getattr(torch.Tensor, name)

        def noted(self, *arguments, name=name, real=real, **keywords):
            waits.append(name)
            return real(self, *arguments, **keywords)

        monkeypatch.setattr(torch.Tensor, name, noted)
    with meter.step(1):
        for seed in range(2):
            batch = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(seed))
            with meter.sample():
                (model(batch[:, :-1], batch[:, 1:]) / 2).backward()
    waits.clear()
    with Operations() as operations:
        meter.read(batch_size=2)
    # Which roots are proven, and the table; what follows reads the table's copy on the host.
    assert waits[: waits.index("cpu") + 1] == ["tolist", "cpu"]
    assert not {"aten::nonzero", "aten::_local_scalar_dense"} & operations.counts.keys()
