"""One truth: the same micro-batches give the same noise and signal on every layout.

The reference takes every micro-batch's gradient by itself, in float64, and uses exact SVDs.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.model.roles import Role, parameter_roles
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined
from gns_pretrain.parallel.sharding import local_shards, parallelize, unsharded_weights
from gns_pretrain.training.step import StepResult, accumulate_gradients, train_step
from tests.dense_reference import Values, noise_and_signal
from tests.distributed.harness import run_ranks
from tests.settings import VOCABULARY, odd_model

LAYOUTS = ("ddp", "fsdp", "hsdp")
ALL = NoiseScaleSettings(
    geometries=["euclidean", "manhattan", "nuclear"],
    estimates=["plug_in", "cross_fitted", "nested"],
    square_root="exact",
)


@dataclass(frozen=True)
class Samples:
    """Micro-batches of one sequence each."""

    count: int = 8
    tokens: int = 6  # fewer than every matrix is wide
    vocabulary: int = VOCABULARY
    eos_id: int | None = None  # ends documents that do not see each other; None: they do

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        shape = (self.count, 1, self.tokens + 1)
        return list(torch.randint(self.vocabulary, shape, generator=generator))


FEW = Samples()
# Neither 3 ranks nor 4 or 12 rounds divide without rounding, and each half lacks a few tokens.
ROUNDED = Samples(count=12, tokens=24, vocabulary=211)
DOCUMENTS = Samples(tokens=14, vocabulary=5, eos_id=0)


@dataclass(frozen=True)
class Case:
    """A model, how it is laid over ranks and what it is trained on."""

    kind: str
    samples: Samples = FEW
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    trainable: tuple[str, ...] = ()  # endings of the blocks' names that train; none names all

    def train_step(self, place: RankInfo, settings: NoiseScaleSettings | None, **changes: Any):
        """One step of plain SGD on this rank's samples; its result and the rows it leaves."""
        with joined(place, ParallelSettings(kind=self.kind), torch.device("cpu")) as world:
            model = self.laid(world, **changes)
            result = train_step(
                model,
                torch.optim.SGD(model.parameters(), lr=1.0),
                map(inputs_and_targets, self.samples.tensors()[place.rank :: place.num_ranks]),
                accumulation=self.samples.count // place.num_ranks,
                gradient_clip=1.0,
                batch_size=self.samples.count,
                meter=NoiseMeter(model, settings) if settings else None,
            )
            return result, [part.detach().clone() for part in local_shards(model.parameters())]

    def laid(self, world: World, **changes: Any) -> torch.nn.Module:
        model = model_of(self.samples, **changes)
        for name, weight in model.named_parameters():
            if name.startswith("layers.") and self.trainable:
                weight.requires_grad_(name.endswith(self.trainable))
        if self.compiled:
            model.compile_blocks("aot_eager")
        return parallelize(model, world, compute_dtype=self.dtype)


# Two matrices have owners on two ranks of four: the second replica of HSDP owns none.
TWO_MATRICES = Case("hsdp", trainable=("0.attention.wq.weight", "0.feed_forward.w1.weight"))
BITS = {
    2: [Case("fsdp", dtype=torch.bfloat16, compiled=True), Case("ddp", trainable=("wq.weight",))],
    4: [Case("hsdp", dtype=torch.bfloat16)],
}


def model_of(samples: Samples = FEW, **changes: Any) -> Llama:
    model = Llama(odd_model(vocab_size=samples.vocabulary, **changes))
    model.init_weights(seed=1)
    if samples.eos_id is not None:
        model.separate_documents(bos_id=None, eos_id=samples.eos_id)
    return model


def values_of(result: StepResult) -> Values:
    """Noise and signal of each geometry and estimate; the gains of a nested one."""
    return {key(r): r.total.gains or (r.total.noise, r.total.signal) for r in result.readings}


def measured(place: RankInfo, case: Case, **changes: Any) -> Values:
    return values_of(case.train_step(place, ALL, **changes)[0])


def measured_on_each(place: RankInfo, cases: list[Case]) -> list[Values]:
    return [
        measured(replace(place, rendezvous=f"{place.rendezvous}-{i}"), case)
        for i, case in enumerate(cases)
    ]


def has_the_same_bits(place: RankInfo, case: Case) -> bool:
    """Whether a measured step and one that is not leave the same norm and weights."""
    (result, weights), (plain, plain_weights) = (
        case.train_step(
            replace(place, rendezvous=f"{place.rendezvous}-{settings is None}"), settings
        )
        for settings in (ALL, None)
    )
    pairs = zip(weights, plain_weights, strict=True)
    return torch.equal(result.gradient_norm, plain.gradient_norm) and all(
        torch.equal(ours, theirs) for ours, theirs in pairs
    )


def on_layouts(place: RankInfo) -> tuple[list[Values], list[bool]]:
    """All that is asked of this many ranks, in one start of them."""
    cases = [Case(kind) for kind in LAYOUTS]
    cases.append(TWO_MATRICES if place.num_ranks == 4 else Case("fsdp", DOCUMENTS))
    same = [
        has_the_same_bits(replace(place, rendezvous=f"{place.rendezvous}-bits-{i}"), case)
        for i, case in enumerate(BITS[place.num_ranks])
    ]
    return measured_on_each(place, cases), same


def sample_gradients(samples: Samples = FEW, **changes: Any) -> dict[str, Tensor]:
    """Every sample's own gradient of every weight, [R, ...] in float64."""
    model = model_of(samples, **changes).double()
    model.compute_dtype = torch.float64
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for sequences in samples.tensors():
        model(sequences[:, :-1], sequences[:, 1:]).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            gradients[name].append(weight.grad)
            weight.grad = None
    return {name: torch.stack(rows) for name, rows in gradients.items()}


def dense_reference(of: Samples = FEW, **changes: Any) -> Values:
    """The equations as they stand, on whole gradients."""
    roles = parameter_roles(model_of(of, **changes))
    matrices = [name for name, role in roles.items() if role is Role.MATRIX]
    values = noise_and_signal(sample_gradients(of, **changes), matrices, of.count)
    return {key: value for key, value in values.items() if key in ALL.measured}


def assert_equal(found: Values, expected: Values, where: str) -> None:
    assert found.keys() == expected.keys()
    for key, numbers in expected.items():
        rel = 1e-4 if key[0] == "nuclear" else 1e-5
        assert found[key] == pytest.approx(numbers, rel=rel), f"{key} on {where}"


@pytest.fixture(scope="module")
def reference() -> Values:
    return dense_reference()


def test_one_process_equals_the_dense_reference(reference):
    assert_equal(measured(RankInfo(), Case("single")), reference, "one process")


@pytest.fixture(scope="module", params=[2, 4])
def on_ranks(request, tmp_path_factory) -> list[tuple[list[Values], list[bool]]]:
    """Of each of 2 and of 4 ranks, what `on_layouts` returns."""
    return run_ranks(request.param, on_layouts, tmp_path_factory.mktemp("ranks"))


def test_every_layout_equals_the_dense_reference(on_ranks, reference):
    for rank, (each, _) in enumerate(on_ranks):
        for kind, found in zip(LAYOUTS, each, strict=False):
            assert_equal(found, reference, f"{kind}, rank {rank} of {len(on_ranks)}")


def test_measured_step_trains_with_the_same_bits_on_every_layout(on_ranks):
    for rank, (_, same) in enumerate(on_ranks):
        for case, is_same in zip(BITS[len(on_ranks)], same, strict=True):
            assert is_same, f"{case}, rank {rank} of {len(on_ranks)}"


def test_replica_that_owns_no_matrix_takes_part(on_ranks):
    alone = measured(RankInfo(), replace(TWO_MATRICES, kind="single"))
    for rank, (each, _) in enumerate(on_ranks):
        for found in each[len(LAYOUTS) :] if len(on_ranks) == 4 else []:
            assert_equal(found, alone, f"hsdp with two matrices, rank {rank}")


def test_documents_that_do_not_see_each_other_are_measured_as_the_dense_reference(on_ranks):
    expected = dense_reference(DOCUMENTS)
    assert expected != dense_reference(replace(DOCUMENTS, eos_id=None))
    for rank, (each, _) in enumerate(on_ranks):
        for found in each[len(LAYOUTS) :] if len(on_ranks) == 2 else []:
            assert_equal(found, expected, f"fsdp with documents, rank {rank}")
    found = measured(RankInfo(), Case("single", DOCUMENTS), activation_checkpointing=True)
    assert_equal(found, expected, "one process with documents, checkpointed")


def test_halves_that_lack_tokens_equal_the_dense_reference_where_ranks_round(tmp_path):
    # Rounding gave coordinates that one half did not touch a sign: off by up to 28 %.
    cases = [Case(kind, ROUNDED) for kind in ("ddp", "fsdp")]
    expected = dense_reference(ROUNDED)
    assert_equal(measured(RankInfo(), Case("single", ROUNDED)), expected, "one process")
    for found in run_ranks(3, measured_on_each, tmp_path, cases)[0]:
        assert_equal(found, expected, "3 ranks")


def test_tied_embeddings_are_one_weight():
    found = measured(RankInfo(), Case("single"), tie_embeddings=True)
    assert_equal(found, dense_reference(tie_embeddings=True), "one process, tied")


def test_activation_checkpointing_shows_each_gradient_once(reference):
    found = measured(RankInfo(), Case("single"), activation_checkpointing=True)
    assert_equal(found, reference, "one process, checkpointed")


class Collectives(TorchDispatchMode):
    """Every collective of the block: its name and the shapes of its tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function._schema.name.startswith("c10d::"):
            tensors = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]
            self.issued.append((function._schema.name, [t.shape for t in tensors]))
        return function(*arguments, **(keywords or {}))


def collectives_of_a_measurement(place: RankInfo) -> list[tuple[str, list[torch.Size]]]:
    """Those of a measured step, the model's and the tap's, in the order in which a rank issues."""
    with joined(place, ParallelSettings(kind="hsdp"), torch.device("cpu")) as world:
        model = parallelize(model_of(), world, compute_dtype=torch.bfloat16)
        meter = NoiseMeter(model, ALL)
        samples = [*map(inputs_and_targets, FEW.tensors()[place.rank :: place.num_ranks])]
        with Collectives() as collectives, meter.measure():
            accumulate_gradients(model, samples, accumulation=len(samples), meter=meter)
        return collectives.issued


def test_every_rank_issues_the_collectives_of_all_groups_in_one_order(tmp_path):
    # Two NCCL communicators in flight at once would otherwise wait for each other.
    first, *others = run_ranks(4, collectives_of_a_measurement, tmp_path)
    kinds = {name for name, _ in first}
    assert {"c10d::reduce_", "c10d::allreduce_"} < kinds
    assert all(issued == first for issued in others)


def memory_of_a_measurement(place: RankInfo) -> tuple[list[int], list[int], int]:
    """Elements of sharded squares and signed sums, of Grams by weight, and of all weights."""
    with joined(place, ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        model = parallelize(model_of(), world, compute_dtype=torch.float32)
        meter = NoiseMeter(model, ALL)
        samples = [inputs_and_targets(FEW.tensors()[place.rank])]
        with meter.measure():
            accumulate_gradients(model, samples, accumulation=1, meter=meter)
        sums = meter.sums()
        sharded = (meter.tap.squares, meter.tap.signed_sums)
        rows = [sum(t.numel() for t in kind) for kind in sharded]
        return rows, sorted(sums.grams), sum(w.weight.shape.numel() for w in meter.tap.weights)


def test_sums_stay_sharded_and_every_gram_has_one_owner(tmp_path):
    num_ranks = 4
    results = run_ranks(num_ranks, memory_of_a_measurement, tmp_path)
    matrices = 2 * 7
    assert sorted(i for _, grams, _ in results for i in grams) == sorted(
        i for i, role in enumerate(parameter_roles(model_of()).values()) if role is Role.MATRIX
    )
    for rows, grams, parameters in results:
        # P / R and the padding of rows that 4 ranks do not divide: at most 3 rows a weight.
        padding = sum(3 * p.shape[1:].numel() for p in model_of().parameters())
        assert all(count <= (parameters + padding) / num_ranks for count in rows)
        assert len(grams) <= -(-matrices // num_ranks)


def unsharded_objects(place: RankInfo) -> bool:
    """Whether FSDP2 shows autograd the same tensors after it has sharded and gathered again."""
    with joined(place, ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        model = parallelize(model_of(), world, compute_dtype=torch.float32)
        before = unsharded_weights(model)
        tokens = FEW.tensors()[0]
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        after = unsharded_weights(model)
        return all(before[name] is after[name] for name in before)


def test_unsharded_weights_stay_the_same_objects(tmp_path):
    assert run_ranks(2, unsharded_objects, tmp_path) == [True, True]


class Either(nn.Module):
    """Takes one of two layers, by the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return self.head(self.odd(x) if index % 2 else self.even(x)).square().mean()


def either(samples: range) -> list[Values]:
    """Two measured steps, the second in the learned order of blocks."""
    torch.manual_seed(0)
    model: nn.Module = Either()
    inputs = torch.randn(8, 2, 3)
    if dist.is_initialized():
        model = DistributedDataParallel(model, find_unused_parameters=True)
    meter = NoiseMeter(model, ALL)
    found = []
    for _ in range(2):
        with meter.step(1):
            for j in samples:
                with meter.sample():
                    (model(inputs[j], j) / len(samples)).backward()
        found.append({key(r): (r.total.noise, r.total.signal) for r in meter.read(batch_size=16)})
        model.zero_grad()
    return found


def either_on_a_rank(place: RankInfo) -> list[Values]:
    with joined(place, ParallelSettings(kind="ddp"), torch.device("cpu")):
        return either(range(place.rank, 8, place.num_ranks))


def two_batch_sizes(place: RankInfo) -> str:
    """What a meter says whose ranks give different batch sizes."""
    with joined(place, ParallelSettings(kind="ddp"), torch.device("cpu")):
        model = DistributedDataParallel(nn.Linear(3, 2))
        meter = NoiseMeter(model, geometries=["euclidean"])
        with meter.step(1):
            for _ in range(2):
                with meter.sample():
                    (model(torch.randn(2, 3)).square().mean() / 2).backward()
        with pytest.raises(InputError) as caught:
            meter.read(batch_size=8 if place.rank else 16)
        return str(caught.value)


def test_ranks_that_differ_in_the_batch_size_all_say_so(tmp_path):
    for said in run_ranks(2, two_batch_sizes, tmp_path):
        assert "ranks differ in their batch_size, 12 on average" in said


def key(reading: Reading) -> tuple[str, str]:
    return reading.total.geometry, reading.total.estimate


def test_ranks_that_use_different_weights_measure_what_one_process_does(tmp_path):
    # Rank 0 never uses the odd layer, rank 1 never the even one.
    expected = either(range(8))[0]
    for rank, each in enumerate(run_ranks(2, either_on_a_rank, tmp_path)):
        for found in each:
            assert_equal(found, expected, f"rank {rank}")
