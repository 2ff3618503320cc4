"""Whole steps on a GPU: what they measure, that nothing waits for them, and that they resume."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gns_pretrain.config.schema import LaunchSettings
from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.geometry.square_root import TOLERANCE
from gns_pretrain.launch.build import build_run
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.parallel.sharding import local_shards, parallelize
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.loop import Run, log_of, one_step
from gns_pretrain.training.step import StepResult, train_step
from tests.dense_reference import Values
from tests.distributed.harness import run_ranks
from tests.distributed.test_noise_scale import (
    ALL,
    FEW,
    assert_equal,
    dense_reference,
    model_of,
    values_of,
)
from tests.end_to_end import commands
from tests.settings import small_run

LAYOUTS = ("single", "ddp", "fsdp", "hsdp")
OPTIMIZERS = [AdamWSettings(lr=1e-2), MuonSettings(lr=1e-2), SignumSettings(lr=1e-3)]


def step_on(
    gpu: torch.device,
    kind: str,
    settings: NoiseScaleSettings | None,
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[StepResult, list[torch.Tensor]]:
    """One step of plain SGD on the samples of tests/distributed, and the weights it leaves."""
    with joined(RankInfo(), ParallelSettings(kind=kind), gpu) as world:
        llama = model_of().to(gpu)
        if compiled:
            llama.compile_blocks()
        model = parallelize(llama, world, compute_dtype=dtype)
        meter = NoiseMeter(model, settings) if settings else None
        result = train_step(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            [inputs_and_targets(sample.to(gpu)) for sample in FEW.tensors()],
            accumulation=FEW.count,
            gradient_clip=1.0,
            batch_size=FEW.count,
            meter=meter,
        )
        if meter:
            result = replace(result, readings=[*result.readings, *meter.read_pending()])
        return result, [part.detach().clone() for part in local_shards(model.parameters())]


@pytest.mark.parametrize("later", [0, 8])  # 8: eigenvalues are taken on the host
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_geometry_and_estimate_equals_the_dense_reference(gpu, kind, later):
    settings = replace(ALL, read_after_steps=later)
    assert_equal(values_of(step_on(gpu, kind, settings)[0]), dense_reference(), kind)


def test_iterative_square_roots_equal_the_dense_reference(gpu):
    settings = replace(ALL, geometries=["nuclear"], estimates=["plug_in"], square_root="iterative")
    found = values_of(step_on(gpu, "single", settings)[0])["nuclear", "plug_in"]
    # Noise and signal are squares of what the tolerance is for.
    expected = dense_reference()["nuclear", "plug_in"]
    assert found == pytest.approx(expected, rel=2 * TOLERANCE)


@pytest.mark.parametrize(("kind", "compiled"), [("single", True), ("fsdp", False), ("fsdp", True)])
def test_measured_step_trains_with_the_same_bits_in_bfloat16(gpu, kind, compiled):
    (measured, weights), (plain, expected) = (
        step_on(gpu, kind, settings, dtype=torch.bfloat16, compiled=compiled)
        for settings in (ALL, None)
    )
    assert torch.equal(measured.gradient_norm, plain.gradient_norm)
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)


@contextmanager
def measured_steps(
    gpu: torch.device, kind: str, **settings: Any
) -> Iterator[Callable[[], StepResult]]:
    """A measured step to repeat, after one that has learned the order of the blocks."""
    with joined(RankInfo(), ParallelSettings(kind=kind), gpu) as world:
        model = parallelize(model_of().to(gpu), world, compute_dtype=torch.bfloat16)
        meter = NoiseMeter(model, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        samples = [inputs_and_targets(sample.to(gpu)) for sample in FEW.tensors()]

        def step() -> StepResult:
            return train_step(
                model,
                optimizer,
                samples,
                accumulation=FEW.count,
                gradient_clip=1.0,
                batch_size=FEW.count,
                meter=meter,
            )

        step()
        torch.cuda.synchronize()
        yield step


@pytest.mark.parametrize("kind", ["single", "fsdp"])
@pytest.mark.parametrize(("geometry", "expected"), [("manhattan", 1), ("nuclear", 2)])
def test_host_waits_once_for_a_measurement_and_twice_for_a_nuclear_one(
    gpu, kind, geometry, expected
):
    with measured_steps(gpu, kind, geometries=[geometry]) as step:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == expected, [str(w.message) for w in waits]


def test_seconds_of_a_measurement_leave_out_the_wait_for_the_rest_of_the_step(gpu):
    with measured_steps(gpu, "single", geometries=["manhattan"]) as step:
        step()
        began = time.perf_counter()
        torch.cuda._sleep(10**9)  # cycles: half a second of other work before the samples'
        (reading,) = step().readings
        took = time.perf_counter() - began
    assert 0.0 < reading.seconds < took / 2


def measured_on_its_gpu(place: RankInfo, kind: str) -> Values:
    """Two steps: the second in the learned order, over NCCL and a group of the tap's own."""
    gpu = torch.device("cuda", place.local_rank)
    with joined(place, ParallelSettings(kind=kind), gpu) as world:
        model = parallelize(model_of().to(gpu), world, compute_dtype=torch.float32)
        meter = NoiseMeter(model, ALL)
        ours = FEW.tensors()[place.rank :: place.num_ranks]
        samples = [inputs_and_targets(sample.to(gpu)) for sample in ours]
        for _ in range(2):
            result = train_step(
                model,
                torch.optim.SGD(model.parameters(), lr=0.0),
                samples,
                accumulation=len(samples),
                gradient_clip=1.0,
                batch_size=FEW.count,
                meter=meter,
            )
        return values_of(result)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_several_gpus_equal_the_dense_reference(gpu, kind, tmp_path):
    ranks = min(4, torch.cuda.device_count()) // 2 * 2
    if not ranks:
        pytest.skip("one GPU has no other to send to")
    for rank, found in enumerate(run_ranks(ranks, measured_on_its_gpu, tmp_path, kind)):
        assert_equal(found, dense_reference(), f"{kind}, rank {rank} of {ranks}")


@contextmanager
def run_on(
    gpu: torch.device, folder: Path, shards: Path, kind: str = "single", **changes: Any
) -> Iterator[Run]:
    """The small run of tests/settings.py on the GPU, as train.py builds it."""
    config = small_run(folder, shards, launch=LaunchSettings(device="cuda"), **changes)
    with joined(RankInfo(), ParallelSettings(kind=kind), gpu) as world:
        run = build_run(config, world, folder / "run")
        try:
            yield run
        finally:
            run.checkpoints.close()
            run.workload.close()
            run.record.close()


@pytest.mark.parametrize("kind", ["single", "fsdp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_host_never_waits_in_an_unmeasured_step(gpu, kind, optimizer, tmp_path, shards):
    with run_on(gpu, tmp_path, shards, kind, optimizer=optimizer) as run:
        log = log_of(run)
        for _ in range(3):  # compiles, and fills the allocator's cache
            one_step(run, log)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                one_step(run, log)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_host_never_waits_in_a_measured_step_that_is_read_later(gpu, kind, tmp_path, shards):
    measured = replace(ALL, every_steps=5, read_after_steps=3, square_root="auto")
    with run_on(gpu, tmp_path, shards, kind, noise_scale=measured) as run:
        log = log_of(run)
        for _ in range(9):  # learns the order of the blocks, compiles, pins memory
            one_step(run, log)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                assert one_step(run, log) == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        readings = one_step(run, log)
    assert {reading.step for reading in readings} == {10}
    assert len(readings) == len(measured.measured)


@pytest.mark.parametrize("kind", ["single", "fsdp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_resumed_run_takes_the_same_steps_bit_for_bit(gpu, kind, optimizer, tmp_path, shards):
    with run_on(gpu, tmp_path, shards, kind, optimizer=optimizer) as run:
        log = log_of(run)
        for step in range(4):
            if step == 2:
                log.flush()
                run.checkpoints.save(run.model, run.optimizer, run.adaptive.state_dict())
            one_step(run, log)
        expected = [part.detach().clone() for part in local_shards(run.model.parameters())]
    with run_on(gpu, tmp_path, shards, kind, optimizer=optimizer) as run:
        assert run.adaptive.steps == 2
        log = log_of(run)
        for _ in range(2):
            one_step(run, log)
        for ours, theirs in zip(local_shards(run.model.parameters()), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_command_trains_and_measures_on_the_gpu(tmp_path, shards):
    words = commands.arguments(
        tmp_path,
        shards,
        "launch.device=cuda",
        "noise_scale=all",
        "noise_scale.estimates=[plug_in,cross_fitted]",
        "noise_scale.every_steps=5",
        "optimizer=muon",
    )
    assert commands.run(words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    lines = list(read_records(tmp_path / "small" / "metrics.jsonl"))
    measured = {line["step"] for line in lines if line["kind"] == "noise"}
    assert measured == {1, 5, 10, 15, 20}
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert losses[-1] < losses[0]


def test_more_ranks_than_gpus_are_refused_before_any_starts(tmp_path, shards):
    ranks = torch.cuda.device_count() + 1
    more = ("launch.device=cuda", f"launch.nproc_per_node={ranks}", "micro_batch_size=1")
    words = commands.arguments(tmp_path, shards, *more)
    assert commands.run(words, tmp_path / "log") == 2
    assert "needs a GPU for each rank of a node" in (tmp_path / "log").read_text()
