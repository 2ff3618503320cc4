"""Runs whose noise scale is read some steps after the one that was measured."""

from dataclasses import replace

import pytest

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.errors import EXIT_STOPPED
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.results import replay
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint import CheckpointSettings
from tests.runs import train_here
from tests.settings import small_run, without_times

MEASURED = NoiseScaleSettings(
    ["manhattan", "nuclear"],
    ["plug_in", "cross_fitted"],
    every_steps=5,
    square_root="exact",
)
DECIDES_EVERY = 5


def config_of(folder, shards, *, later: int, save_every: int = 100, steps: int = 14):
    """A run whose batch grows by its nuclear scale: measured at 1, 5, 10, ... of its steps."""
    return small_run(
        folder,
        shards,
        steps=steps,
        micro_batch_size=1,
        optimizer=AdamWSettings(lr=1e-3),
        batch_size=BatchSizeSettings(
            "adaptive",
            initial=8,
            geometry="nuclear",
            theta=0.3,
            cap=16,
            decide_every_steps=DECIDES_EVERY,
            warmup_fraction=0.0,
        ),
        noise_scale=replace(MEASURED, read_after_steps=later),
        checkpoint=CheckpointSettings(every_steps=save_every),
    )


def lines_of(folder, *kinds: str) -> list[dict]:
    records = read_records(folder / "small" / "metrics.jsonl")
    return [without_times(line) for line in records if not kinds or line["kind"] in kinds]


def trained(folder, shards, **settings) -> list[dict]:
    assert train_here(config_of(folder, shards, **settings)) == 0
    return lines_of(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, shards) -> list[dict]:
    return trained(tmp_path_factory.mktemp("whole"), shards, later=3)


def test_decisions_and_numbers_are_those_of_immediate_readings(tmp_path, shards, uninterrupted):
    # Read at the ends of 4, 8 and 13, each before the decision that it would have changed.
    immediate = trained(tmp_path, shards, later=0)
    for kind in ("train", "validation", "batch_size"):
        expected = [line for line in immediate if line["kind"] == kind]
        assert [line for line in uninterrupted if line["kind"] == kind] == expected
    assert any(line["kind"] == "batch_size" for line in immediate)
    late = [line for line in uninterrupted if line["kind"] == "noise"]
    last = immediate[-1]["step"]
    for line in late:
        assert read_at(line) == min(line["step"] + 3, last)
    without = [{k: v for k, v in line.items() if k != "read_at_step"} for line in late]
    assert without == [line for line in immediate if line["kind"] == "noise"]


def read_at(line: dict) -> int:
    return line.get("read_at_step", line["step"])


def test_reading_pending_at_the_last_step_is_read_then(tmp_path, shards):
    trained(tmp_path, shards, later=4, steps=7)
    last = lines_of(tmp_path, "train")[-1]["step"]
    assert 5 < last < 9
    noise = lines_of(tmp_path, "noise")
    assert {(line["step"], read_at(line)) for line in noise} == {(1, 5), (5, last)}


@pytest.mark.parametrize("stop_after", [5, 7, 8])
def test_stopped_while_a_reading_is_pending_it_ends_with_the_same_lines(
    stop_after, tmp_path, shards, uninterrupted
):
    config = config_of(tmp_path, shards, later=3)
    assert train_here(config, stop_after=stop_after) == EXIT_STOPPED
    assert train_here(config) == 0
    assert lines_of(tmp_path) == uninterrupted


def test_killed_while_a_reading_is_pending_it_ends_with_the_same_lines(
    tmp_path, shards, uninterrupted
):
    """Saved at 4 and 8, where readings come, and not at 2 and 6, where they are awaited."""
    config = config_of(tmp_path, shards, later=3, save_every=2)
    folders = []

    def die() -> None:
        folders.extend(path.name for path in tmp_path.glob("small/checkpoints/step_*"))
        raise KeyboardInterrupt

    for step in (7, 3, 2):  # of each start
        with pytest.raises(KeyboardInterrupt):
            train_here(config, meanwhile={step: die})
    assert train_here(config) == 0
    assert lines_of(tmp_path) == uninterrupted
    assert folders[0] == "step_00000004"


def test_replay_takes_late_readings_where_the_run_did(tmp_path, shards):
    trained(tmp_path, shards, later=3)
    file = tmp_path / "small" / "metrics.jsonl"
    recorded = replay.read_run(file, reads=("nuclear", "plug_in"), raw=False)
    assert list(recorded.measurements) == sorted({read_at(n) for n in lines_of(tmp_path, "noise")})
    assert replay.main([str(file), "--json"]) == 0
