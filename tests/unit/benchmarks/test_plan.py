"""The project's own step at full size on a GPU that is not there, against what a GPU showed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import fake_gpu
from benchmarks.costs import Costs, Rates
from benchmarks.fake_gpu import Collective, FakeGPU, Kernel, Recording, Stream, Work
from benchmarks.harness import OPTIMIZERS, model_config
from benchmarks.interception import one_rank_of
from benchmarks.plan import NOT_SEEN_GIB, Case, RunPlan, cells_of
from benchmarks.rehearsal import rehearsal
from gns_pretrain.config.schema import Config
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings

FIGURES = Path(__file__).parents[3] / "docs" / "gpu" / "2026-11-26_h100.jsonl"
REVISION = "40609d9"  # of the table there
GEOMETRIES = ["euclidean", "manhattan", "nuclear"]
SMALL = LlamaConfig(
    name="test", dim=48, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=80, vocab_size=90
)


def config_of(
    model, *, parallel="fsdp", optimizer="adamw", compiled=True, sequences=8, length=2048
):
    return Config(
        run_name="plan",
        token_budget=1,
        micro_batch_size=sequences,
        model=model,
        optimizer=OPTIMIZERS[optimizer],
        data=DataSettings(sequence_length=length),
        parallel=ParallelSettings(kind=parallel),
        compile="auto" if compiled else "never",
    )


def small_steps(num_ranks, *, geometries=GEOMETRIES, **options):
    """An unmeasured step of a small model whose blocks are not compiled, and a measured one."""
    config = config_of(SMALL, compiled=False, sequences=2, length=16, **options)
    settings = NoiseScaleSettings(geometries=geometries, estimates=["plug_in", "cross_fitted"])
    with rehearsal(config, num_ranks, accumulation=2) as run:
        return run.step(), run.step(settings)


@pytest.fixture(scope="module")
def on_8_gpus():
    """llama3_160m under FSDP2: a step unmeasured and measured."""
    with rehearsal(config_of(model_config("llama3_160m", 128_256)), 8) as run:
        return {
            name: run.step(NoiseScaleSettings(geometries=[name]) if name else None)
            for name in ("", "manhattan", "nuclear")
        }


def measured_peaks(model):
    """GiB that docs/performance.md has: without a measurement, and with each geometry's."""
    peaks = {}
    for line in FIGURES.read_text().splitlines():
        row = json.loads(line)
        if row.get("code") == REVISION and row["measured"] == "measurement" and "peak_gib" in row:
            if row["model"] != model:
                continue
            peaks["unmeasured"] = row["peak_gib_without"]
            peaks[row["geometry"]] = row["peak_gib"]
    return peaks


@pytest.mark.parametrize(
    ("model", "geometries"), [("llama3_160m", ["manhattan"]), ("llama3_1b", [])]
)
def test_peak_memory_is_within_5_percent_of_what_a_gpu_showed(model, geometries):
    # Measured at 8 micro-batches; from the second on, each peaks alike.
    config = config_of(model_config(model, 128_256), parallel="single")
    plan = RunPlan(Rates(), Case(config, 1, 2), geometries)
    for step, recording in plan.steps.items():
        assert recording.peak / 2**30 == pytest.approx(measured_peaks(model)[step], rel=0.05)
    assert plan.fits == (plan.peak_gib + NOT_SEEN_GIB <= 79)


def test_collectives_of_a_step_are_fsdp2s_own_and_one_for_clipping(on_8_gpus):
    model = model_config("llama3_160m", 128_256)
    counts = count_parameters(model)
    found = {c: [] for c in ("all-gather", "reduce-scatter", "all-reduce")}
    for collective in on_8_gpus[""].collectives:
        found[collective.kind].append(collective.sent)
    # Each block is gathered for the forward and for the backward pass, the root once, in bfloat16;
    # every gradient leaves once, in float32. An eighth of each is a rank's own.
    root = counts.total - counts.in_blocks
    assert len(found["all-gather"]) == 2 * model.num_layers + 1
    assert sum(found["all-gather"]) == 7 / 8 * 2 * (2 * counts.in_blocks + root)
    assert len(found["reduce-scatter"]) == model.num_layers + 1
    assert sum(found["reduce-scatter"]) == 7 / 8 * 4 * counts.total
    assert found["all-reduce"] == [2 * 7 / 8 * 4]


def test_a_measurement_sends_squares_as_gradients_are_sent_and_grams_once(on_8_gpus):
    model = model_config("llama3_160m", 128_256)
    sent = {
        name: sum(c.sent for c in on_8_gpus[name].collectives if c.part == "measurement")
        for name in ("manhattan", "nuclear")
    }
    # A little more for totals, padding, and the entries by which mean and samples are compared.
    assert sent["manhattan"] == pytest.approx(7 / 8 * 4 * count_parameters(model).total, rel=2e-3)
    # Seven float64 Grams of 768 x 768 a block, and the rows of the mean gradients, an eighth each.
    grams = 7 / 8 * 7 * 18 * 8 * 768**2
    means = 7 / 8 / 8 * 4 * 18 * (4 * 768**2 + 3 * 768 * 2048)
    assert sent["nuclear"] == pytest.approx(grams + means, rel=5e-3)


def test_a_step_waits_for_nothing_and_a_measurement_for_its_table(on_8_gpus):
    waits = {name: step.waits.total() for name, step in on_8_gpus.items()}
    assert waits[""] == 0
    assert waits["manhattan"] == 1
    assert all("noise_scale" in w or "geometry" in w for w in on_8_gpus["nuclear"].waits)


def test_full_size_steps_have_no_unordered_access(on_8_gpus):
    assert [step.races for step in on_8_gpus.values()] == [Counter()] * 3


@pytest.mark.parametrize(
    ("kind", "ranks", "optimizer"),
    [("fsdp", 5, "muon"), ("hsdp", 8, "adamw"), ("single", 1, "sgd")],
)
def test_no_wait_and_no_unordered_access_on_any_layout(kind, ranks, optimizer):
    step, measured = small_steps(ranks, parallel=kind, optimizer=optimizer)
    assert not step.waits
    assert not step.races
    assert not measured.races


def test_planted_races_are_found(monkeypatch):
    real_wait, real_collective = Work.wait, FakeGPU.collective

    def no_wait(work):
        return fake_gpu.caller()[0] == "measurement" or real_wait(work)

    def overwritten(gpu, kind, sent, reads, writes, group, async_op):
        work = real_collective(gpu, kind, sent, reads, writes, group, async_op)
        if async_op and fake_gpu.caller()[0] == "measurement":
            reads[0].zero_()
        return work

    assert not small_steps(8, geometries=["manhattan"])[1].races
    for owner, name, sabotage, found in (
        (Work, "wait", no_wait, "works on measurement"),
        (FakeGPU, "collective", overwritten, "aten::zero_ (measurement)"),
        (Stream, "wait_event", lambda stream, event: None, "works on gathered weights"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, sabotage)
            races = small_steps(8, geometries=["manhattan"])[1].races
        assert any(found in race for race in races), races


def test_nothing_is_left_behind():
    with one_rank_of(4, ParallelSettings()) as (world, _):
        assert torch.ones(2, device=world.device).is_cuda
    assert not dist.is_initialized()
    assert torch.ones(2).sum().item() == 2
    with pytest.raises(InputError, match="reduces gradients in C"):
        one_rank_of(4, ParallelSettings(kind="ddp")).__enter__()


def test_seconds_by_hand():
    costs = Costs(
        Rates(bfloat16_teraflops=1, memory_terabytes=2, launch_microseconds=1e6), width=768
    )
    assert costs.kernel(Kernel("", "", bytes=4 * 10**12)) == 2
    assert costs.kernel(Kernel("", "", bytes=4, flops=3 * 10**12, unit="bfloat16")) == 3
    step = Recording(kernels=[Kernel("", "", 4 * 10**12, launches=3)])
    assert (costs.device(step), costs.host(step), costs.step(step)) == (2, 3, 3)


@pytest.mark.parametrize(
    ("kind", "ranks", "rate"),
    [
        ("all-gather", range(8), 360),  # NVLink
        ("all-gather", range(16), 8 * 40),  # all cards of a node carry the ring
        ("all-reduce", range(0, 64, 8), 40),  # one rank of each node: its own card
        ("all-to-all", range(16), 40 * 15 / 8),  # 8 of 15 others are on the other node
    ],
)
def test_interconnect_by_hand(kind, ranks, rate):
    seconds = Costs(Rates(), 768).collective(Collective("", kind, 36e9, tuple(ranks)))
    assert seconds == pytest.approx(36 / rate)


def test_a_sweep_has_the_cells_and_seeds_that_train_py_would_start():
    cells = cells_of("table2", "paper")
    assert len(cells) == 20
    assert {seeds for *_, seeds in cells} == {10}
    name, config, _ = cells[-1]
    assert (name, config.optimizer.name) == ("table2/muon_adaptive", "muon")
    assert (config.batch_size.initial, config.noise_scale.geometries) == (64, ["nuclear"])
    with pytest.raises(InputError, match="sweep=nothing: there is no such choice"):
        cells_of("nothing", "paper")


def test_hours_of_a_run_by_hand():
    plan = object.__new__(RunPlan)
    plan.case = Case(config_of(SMALL, length=100), 2, accumulation=4)  # 2 x 4 x 8 x 100 tokens
    plan.rates, plan.costs = Rates(), Costs(Rates(launch_microseconds=1e6), 768)
    plan.steps = {"unmeasured": Recording(kernels=[Kernel("", "", 0)] * 2)}
    plan.steps["nuclear"] = Recording(kernels=[Kernel("", "", 0)] * 12)
    # 10 steps of 2 s; every fifth one takes 10 s more.
    assert plan.hours(63_000, [], 5) == pytest.approx(20 / 3600)
    assert plan.hours(63_000, ["nuclear"], 5) == pytest.approx(40 / 3600)
