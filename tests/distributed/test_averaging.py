"""Averaged weights are those of one process on every layout, evaluations among its steps too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gns_pretrain.config.schema import Config
from gns_pretrain.launch.train import run_rank
from gns_pretrain.optim.adamw import AdamWPart
from gns_pretrain.optim.averaging import AveragingSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, load_model
from gns_pretrain.training.evaluate import EvaluationSettings
from tests.distributed.harness import run_ranks
from tests.runs import train_here
from tests.settings import SEQUENCE_LENGTH, odd_model, small_run

STEPS = 6
GPA = AveragingSettings("ema", decay=0.8, interpolation=0.7, count_first=True)
RUNS: dict[str, dict[str, Any]] = {
    "gpa": {"averaging": GPA, "optimizer": MuonSettings(lr=1e-2, adamw=AdamWPart(lr=1e-2))},
    "schedule_free": {
        "optimizer": CustomSettings(class_path="schedulefree.AdamWScheduleFree", lr=0.01)
    },
}
LAYOUTS = {
    "ddp": ParallelSettings(kind="ddp"),
    "fsdp": ParallelSettings(kind="fsdp"),
    "hsdp": ParallelSettings(kind="hsdp", shard_size=2),
    "tensor": ParallelSettings(kind="fsdp", tensor_size=2),
}
CASES = [
    (2, "ddp", "gpa"),
    (2, "fsdp", "gpa"),
    (2, "fsdp", "schedule_free"),
    (4, "hsdp", "gpa"),
    (4, "tensor", "gpa"),
]


def run_of(folder: Path, data: Path, name: str, layout: str) -> Config:
    """A run that evaluates after every other step, which leaves the root's weights gathered."""
    return small_run(
        folder,
        data,
        steps=STEPS,
        run_name=f"{name}-{layout}",
        model=odd_model(dim=24, num_heads=4, num_kv_heads=2),
        evaluation=EvaluationSettings(every_tokens=2 * 8 * SEQUENCE_LENGTH, num_sequences=7),
        parallel=LAYOUTS.get(layout, ParallelSettings()),
        **RUNS[name],
    )


def train_each(place: RankInfo, folder: Path, data: Path) -> None:
    """One rank's part in every run of so many ranks."""
    for num_ranks, layout, name in CASES:
        if num_ranks == place.num_ranks:
            here = replace(place, rendezvous=f"{place.rendezvous}-{layout}-{name}")
            config = run_of(folder, data, name, layout)
            assert run_rank(config, folder / config.run_name, "data", here) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards) -> Path:
    """Every run, on one process and on its layouts."""
    folder = tmp_path_factory.mktemp("averaging")
    for name in RUNS:
        assert train_here(run_of(folder, shards, name, "alone")) == 0
    for num_ranks in (2, 4):
        run_ranks(num_ranks, train_each, folder, folder, shards)
    return folder


@pytest.mark.parametrize(("num_ranks", "layout", "name"), CASES)
def test_losses_and_saved_average_are_those_of_one_process(num_ranks, layout, name, folder):
    alone, several = folder / f"{name}-alone", folder / f"{name}-{layout}"
    expected = list(read_records(alone / "metrics.jsonl"))
    found = list(read_records(several / "metrics.jsonl"))
    assert [line["kind"] for line in found] == [line["kind"] for line in expected]
    assert sum(line["kind"] == "validation" for line in found) == 4
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    models = [load_model(checkpoint_folders(run / "checkpoints")[0]) for run in (several, alone)]
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        # A rounding of the training weights is in z 1 / (1 - 0.7) times, in steps of Muon more.
        assert (mine - theirs).abs().max().item() < 1e-4
