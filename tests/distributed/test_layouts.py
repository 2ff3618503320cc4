"""The same seed gives the same run on every layout, with widths that the ranks do not divide."""

from pathlib import Path

import pytest

from gns_pretrain.launch.train import launch, run_rank
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo
from gns_pretrain.tracking.jsonl import read_records
from tests.distributed.harness import run_ranks
from tests.settings import small_run, without_times

KINDS = ("ddp", "fsdp", "hsdp")


def losses(folder: Path, kind: str) -> list[tuple[str, int, float]]:
    records = read_records(folder / f"small-{kind}" / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records]


def train_each(place: RankInfo, kinds: tuple[str, ...], folder: Path, data: Path) -> list[int]:
    """One rank's part of a run of each layout, one after the other."""
    codes = []
    for kind in kinds:
        config = small_run(
            folder, data, run_name=f"small-{kind}", parallel=ParallelSettings(kind=kind)
        )
        here = RankInfo(
            place.rank,
            place.num_ranks,
            place.local_rank,
            place.ranks_per_node,
            f"{place.rendezvous}-{kind}",
        )
        codes.append(run_rank(config, folder / config.run_name, "data", here))
    return codes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, shards) -> list[tuple[str, int, float]]:
    folder = tmp_path_factory.mktemp("single")
    config = small_run(
        folder, shards, run_name="small-single", parallel=ParallelSettings(kind="single")
    )
    assert launch(config) == 0
    return losses(folder, "single")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_of_twenty_steps_equal_those_of_one_process(
    num_ranks, one_process, tmp_path, shards
):
    codes = run_ranks(num_ranks, train_each, tmp_path, KINDS, tmp_path, shards)
    assert codes == [[0] * len(KINDS)] * num_ranks
    assert [kind for kind, _, _ in one_process].count("train") == 20
    assert one_process[-1][2] < 0.9 * one_process[0][2]
    for kind in KINDS:
        found = losses(tmp_path, kind)
        assert [row[:2] for row in found] == [row[:2] for row in one_process]
        # Float32 sums in another order: 1e-5 is the bound that is promised.
        for (name, step, loss), (_, _, expected) in zip(found, one_process, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5), f"{kind}: {name} at step {step}"


def test_fsdp_of_one_process_is_the_same_run(one_process, tmp_path, shards):
    config = small_run(
        tmp_path, shards, run_name="small-fsdp", parallel=ParallelSettings(kind="fsdp")
    )
    assert launch(config) == 0
    for found, expected in zip(losses(tmp_path, "fsdp"), one_process, strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], rel=1e-6)


def test_every_line_has_the_documented_keys_in_their_order(tmp_path, shards):
    config = small_run(tmp_path, shards, steps=2, run_name="small-single")
    assert launch(config) == 0
    train, validation, *_ = read_records(tmp_path / "small-single" / "metrics.jsonl")
    assert list(train) == [
        "kind",
        "step",
        "samples",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "batch_size",
        "micro_batch_size",
        "accumulation",
        "step_seconds",
        "tokens_per_second",
    ]
    assert list(validation) == ["kind", "step", "tokens", "loss"]
    assert without_times(train)["samples"] == 8
