"""Tensor parallelism takes one process's steps, and measures its noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from gns_pretrain.config.schema import Config
from gns_pretrain.launch.train import launch, run_rank
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWPart, AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.collectives import global_norm
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, load_model
from tests.distributed.harness import run_ranks
from tests.settings import VOCABULARY, odd_model, small_run, threads

RULES: dict[str, OptimizerSettings] = {
    "adamw": AdamWSettings(lr=1e-2),
    "signum": SignumSettings(lr=1e-3),
    "muon": MuonSettings(lr=1e-2, adamw=AdamWPart(lr=1e-2)),
    "muon_mup": MuonSettings(lr=1e-2, scaling="match_rms_adamw", adamw=AdamWPart(lr=1e-2)),
}
MUP = {"parametrization": "mup", "mup_base_dim": 8}
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
FSDP = ParallelSettings(kind="fsdp", tensor_size=2)
HSDP = ParallelSettings(kind="hsdp", shard_size=1, tensor_size=2)
# Ranks, layout, rules. A start of ranks for each: torch caches a mesh's groups as long as it lives.
LAYOUTS: dict[str, tuple[int, ParallelSettings, list[str]]] = {
    "2 tensor": (2, FSDP, list(RULES)),
    "2 shards, 2 tensor": (4, FSDP, list(RULES)),
    "2 replicas, 2 tensor": (4, HSDP, ["muon"]),
}
STEPS = 6
# Changes of the model, dtype of its compute copies, and the relative error of the gradients' norm.
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "plain": ({}, torch.float32, 1e-6),
    "tied": ({"tie_embeddings": True}, torch.float32, 1e-6),
    "checkpointing": ({"activation_checkpointing": True}, torch.float32, 1e-6),
    "compiled": ({}, torch.float32, 1e-6),
    # Partial sums of wo and w2 are rounded to 2^-8 before they are added.
    "bfloat16": ({}, torch.bfloat16, 2**-7),
}


def run_of(rule: str, folder: Path, data: Path, parallel: ParallelSettings) -> Config:
    """A run of two blocks, with 13 hidden units a rank and 61 token ids, with all noise scales."""
    return small_run(
        folder,
        data,
        steps=STEPS,
        run_name=rule,
        model=odd_model(
            dim=24, num_heads=4, num_kv_heads=2, **(MUP if rule.endswith("mup") else {})
        ),
        optimizer=RULES[rule],
        noise_scale=NoiseScaleSettings(
            geometries=["euclidean", "manhattan", "nuclear"], every_steps=4, square_root="exact"
        ),
        parallel=parallel,
    )


def train_each(
    place: RankInfo, folder: Path, data: Path, parallel: ParallelSettings, rules: list[str]
) -> list[int]:
    """One rank's part of a run with each rule."""
    codes = []
    for rule in rules:
        config = run_of(rule, folder, data, parallel)
        here = replace(place, rendezvous=f"{place.rendezvous}-{rule}")
        codes.append(run_rank(config, folder / rule, "data", here))
    return codes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, shards) -> Path:
    folder = tmp_path_factory.mktemp("one_process")
    for rule in RULES:
        assert launch(run_of(rule, folder, shards, ParallelSettings(kind="single"))) == 0
    return folder


def model_of(variant: str, world: World) -> torch.nn.Module:
    changes, dtype, _ = VARIANTS[variant]
    llama = Llama(odd_model(dim=24, num_heads=4, num_kv_heads=2, **changes))
    llama.init_weights(seed=0)
    if variant == "compiled":
        llama.compile_blocks("aot_eager")
    return parallelize(llama, world, compute_dtype=dtype)


def loss_and_norms(model: torch.nn.Module) -> list[float]:
    """The loss of four sequences, and the norm of each weight's gradient."""
    tokens = torch.randint(VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = [[weight.grad] for weight in model.parameters() if weight.grad is not None]
    return [loss.item(), *(global_norm(gradient).item() for gradient in gradients)]


def variants_of(place: RankInfo) -> tuple[dict[str, list[float]], int]:
    """One rank's loss and norms of each variant, and the all-reduces of the plain one."""
    found = {}
    with joined(place, FSDP, torch.device("cpu")) as world:
        for variant in VARIANTS:
            found[variant] = loss_and_norms(model_of(variant, world))
        with CommDebugMode() as counted:
            model = model_of("plain", world)
            tokens = torch.zeros(1, 8, dtype=torch.int64)
            model(tokens, tokens).backward()
        return found, counted.get_comm_counts()[torch.ops.c10d_functional.all_reduce]


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> tuple[dict[str, list[float]], int]:
    return run_ranks(2, variants_of, tmp_path_factory.mktemp("variants"))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_one_process(variant, variants):
    threads()
    expected = loss_and_norms(model_of(variant, ALONE))
    assert variants[0][variant] == pytest.approx(expected, rel=VARIANTS[variant][2])


def test_block_takes_two_all_reduces_in_each_direction(variants):
    assert variants[1] == 4 * odd_model().num_layers


def losses(run: Path) -> list[tuple[str, int, float]]:
    records = read_records(run / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]


def readings(run: Path) -> list[tuple[int, str, float, float]]:
    records = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "noise"]
    return [(r["step"], r["geometry"], r["noise"], r["signal"]) for r in records]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(checkpoint_folders(run / "checkpoints")[0]).state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_readings_and_checkpoints_equal_those_of_one_process(
    layout, one_process, tmp_path, shards
):
    num_ranks, parallel, rules = LAYOUTS[layout]
    codes = run_ranks(num_ranks, train_each, tmp_path, tmp_path, shards, parallel, rules)
    assert codes == [[0] * len(rules)] * num_ranks
    for rule in rules:
        run, expected = tmp_path / rule, one_process / rule
        for found, wanted in zip(losses(run), losses(expected), strict=True):
            assert found[:2] == wanted[:2]
            assert found[2] == pytest.approx(wanted[2], rel=1e-5), (rule, found)
        for reading, wanted_reading in zip(readings(run), readings(expected), strict=True):
            assert reading[:2] == wanted_reading[:2]
            assert reading[2:] == pytest.approx(wanted_reading[2:], rel=1e-5), (rule, reading)
        assert len(readings(run)) == 2 * 3
        weights, wanted_weights = last_weights(run), last_weights(expected)
        assert weights.keys() == wanted_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-3, atol=1e-4)
