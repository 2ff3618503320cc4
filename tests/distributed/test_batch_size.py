"""A run that resumes on other ranks keeps its batch, or takes the next larger one."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.schema import Config
from gns_pretrain.launch.train import run_rank
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo
from gns_pretrain.tracking.jsonl import read_records
from tests.distributed.harness import run_ranks
from tests.settings import small_run, without_times

STAGES = {"stage_tokens": [128 * 4, 128 * 8], "stage_sizes": [10, 14]}


def staged_run(folder: Path, data: Path, kind: str, **changes: Any) -> Config:
    """8 sequences a step for 4 steps, then 10, then 14, with a noise scale of 2 samples or more."""
    return small_run(
        folder,
        data,
        steps=16,
        micro_batch_size=1,
        batch_size=BatchSizeSettings(initial=8, policy="staged", **STAGES, **changes),
        noise_scale=NoiseScaleSettings(geometries=["manhattan"], every_steps=4, min_samples=2),
        parallel=ParallelSettings(kind=kind),
    )


def train(place: RankInfo, config: Config, stop_after: int | None) -> int:
    """A rank of the run; asked to stop when it has written the checkpoint of a step."""
    if stop_after is not None:
        from gns_pretrain.training import loop

        take = loop.one_step

        def take_and_stop(run, log):
            readings = take(run, log)
            if run.adaptive.steps == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return readings

        loop.one_step = take_and_stop
    return run_rank(config, Path(config.output_directory) / "small", "data", place)


def of_kind(folder: Path, kind: str) -> list[dict]:
    records = read_records(folder / "small" / "metrics.jsonl")
    return [without_times(record) for record in records if record["kind"] == kind]


def moved(folder: Path, shards: Path, *, ranks: tuple[int, int], stop_after: int) -> list[dict]:
    """Training lines of a run that is stopped and resumes on other ranks."""
    kinds = ["single" if count == 1 else "ddp" for count in ranks]
    first, second = (staged_run(folder, shards, kind) for kind in kinds)
    assert set(run_ranks(ranks[0], train, folder, first, stop_after)) == {75}
    assert set(run_ranks(ranks[1], train, folder, second, None)) == {0}
    return of_kind(folder, "train")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, train, folder, staged_run(folder, shards, "single"), None) == [0]
    return of_kind(folder, "train")


def test_ranks_that_can_take_the_batch_go_on_with_it_and_the_same_sequences(
    whole, tmp_path, shards
):
    found = moved(tmp_path, shards, ranks=(1, 2), stop_after=6)
    assert len(found) == len(whole)
    for mine, theirs in zip(found, whole, strict=True):
        for name in ("step", "samples", "batch_size", "lr"):
            assert mine[name] == theirs[name], name
        # The same sequences in the same order: float32 sums in another order, promised to 1e-5.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_ranks_that_cannot_take_the_batch_take_the_next_larger_and_say_so(tmp_path, shards):
    found = moved(tmp_path, shards, ranks=(1, 3), stop_after=6)
    # 10 becomes 12 on 3 ranks; the next stage, 14, is rounded down to 12 and changes nothing.
    assert [line["batch_size"] for line in found] == [8] * 4 + [10] * 2 + [12] * (len(found) - 6)
    assert found[6]["samples"] == found[5]["samples"] + 12
    planned, forced = of_kind(tmp_path, "batch_size")
    assert (planned["step"], planned["from"], planned["to"], planned["target"]) == (5, 8, 10, 10)
    assert (forced["step"], forced["from"], forced["to"], forced["target"]) == (7, 10, 12, None)
    assert forced["lr_multiplier"] == 1.5**0.5
    schedule = found[5]["lr"] / planned["lr_multiplier"]
    assert 0.5 * schedule < found[6]["lr"] / forced["lr_multiplier"] < schedule


def weigh(place: RankInfo, config: Config) -> int:
    """A rank whose clock is its own: on rank 1 steps take no fixed time."""
    from gns_pretrain.training import loop, step_log

    take = loop.one_step

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    def timed(run, log):
        clock.now += run.adaptive.batch_size / 4 + (0.0 if place.rank else 4.0)
        return take(run, log)

    clock = Clock()
    step_log.time, loop.one_step = clock, timed  # in this process, which ends with the run
    return run_rank(config, Path(config.output_directory) / "small", "data", place)


def test_ranks_with_clocks_of_their_own_weigh_the_same_seconds(tmp_path, shards):
    goodput = BatchSizeSettings(
        initial=8, policy="goodput", micro_batch_max=64, warmup_fraction=0.0, decide_every_steps=8
    )
    config = replace(staged_run(tmp_path, shards, "ddp"), batch_size=goodput, token_budget=128 * 60)
    assert run_ranks(2, weigh, tmp_path, config) == [0, 0]
    changes = of_kind(tmp_path, "batch_size")
    assert len(changes) >= 2
    assert "a step takes 4 s and 0.25 s a sample, by 2 batch sizes" in changes[1]["why"]
