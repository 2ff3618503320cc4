"""A run on images: the same on every layout, and after a kill, with running statistics."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.config.schema import Config, LaunchSettings
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.launch.train import launch, run_rank
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.settings import ModelSettings
from gns_pretrain.model.simple_vit import SimpleViTConfig
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.checkpoint_reader import checkpoint_folders
from tests.distributed.harness import run_ranks
from tests.end_to_end import commands
from tests.image_folders import write_images
from tests.settings import without_times

KINDS = ("ddp", "fsdp", "hsdp")
MODELS: dict[str, ModelSettings] = {
    "resnet": ResNetConfig("odd", width=3, blocks_per_stage=[1, 1]),
    "vit": SimpleViTConfig("odd", patch_size=2, dim=12, num_layers=2, num_heads=3, ffn_dim=10),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", train=40, validation=7)


def image_run(folder: Path, data: Path, model: str, kind: str, **changes: Any) -> Config:
    """Fifteen steps of 8 images, three epochs, measured and evaluated once in each."""
    values: dict[str, Any] = {
        "run_name": f"{model}-{kind}",
        "output_directory": str(folder),
        "token_budget": None,
        "epochs": 3.0,
        "micro_batch_size": 2,
        "gradient_clip": None,
        "model": MODELS[model],
        "data": ImageDataSettings(path=str(data)),
        "optimizer": SGDSettings(lr=0.05),
        "batch_size": BatchSizeSettings(initial=8),
        "noise_scale": NoiseScaleSettings(["euclidean", "manhattan", "nuclear"], every_epochs=1.0),
        "parallel": ParallelSettings(kind=kind),
        "checkpoint": CheckpointSettings(every_steps=4),
        "metrics": MetricsSettings(log_every=3, progress="never"),
        "launch": LaunchSettings(device="cpu", threads=1),
    }
    return Config(**(values | changes))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [without_times(line) for line in read_records(folder / name / "metrics.jsonl")]


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    """All numbers of all lines: float32 sums in another order."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Noise is a difference of squares that are nearly equal.
            bound = 1e-3 if theirs["kind"] == "noise" else 1e-5
            near = pytest.approx(value, rel=bound) if isinstance(value, float) else value
            if key not in ("micro_batch_size", "accumulation", "seconds"):
                assert ours[key] == near, f"{name}: {key} at step {theirs['step']}"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, images) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("single")
    for model in MODELS:
        assert launch(image_run(folder, images, model, "single")) == 0
    return {model: lines(folder, f"{model}-single") for model in MODELS}


def train_each(place: RankInfo, folder: Path, data: Path) -> list[int]:
    codes = []
    for model in MODELS:
        for kind in KINDS:
            config = image_run(folder, data, model, kind)
            here = replace(place, rendezvous=f"{place.rendezvous}-{config.run_name}")
            codes.append(run_rank(config, folder / config.run_name, "data", here))
    return codes


def test_lines_count_images_and_measurements_come_by_epochs(one_process):
    for found in one_process.values():
        train = [line for line in found if line["kind"] == "train"]
        assert [line["samples"] for line in train] == list(range(8, 121, 8))
        assert not any("tokens" in line or "tokens_per_second" in line for line in found)
        evaluated = [line for line in found if line["kind"] == "validation"]
        assert [line["samples"] for line in evaluated] == [8, 40, 80, 120]
        assert all(0 <= line["accuracy"] <= 1 for line in evaluated)
        measured = {line["step"] for line in found if line["kind"] == "noise"}
        assert measured == {1, 5, 10, 15}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_accuracies_and_noise_scales_equal_those_of_one_process(
    num_ranks, one_process, images, tmp_path
):
    codes = run_ranks(num_ranks, train_each, tmp_path, tmp_path, images)
    assert codes == [[0] * len(KINDS) * len(MODELS)] * num_ranks
    for model, expected in one_process.items():
        for kind in KINDS:
            assert_close(lines(tmp_path, f"{model}-{kind}"), expected, f"{model}, {kind}")


def words_of(folder: Path, data: Path, *more: str) -> list[str]:
    """The ResNet's run as a command line."""
    return [
        *("workload=cifar10", "run_name=images", f"output_directory={folder}"),
        *(f"data.path={data}", "epochs=3", "micro_batch_size=2", "batch_size.initial=8"),
        *("model.width=3", "model.blocks_per_stage=[1,1]", "optimizer=sgd_momentum"),
        *("optimizer.lr=0.05", "noise_scale=all", "noise_scale.every_epochs=1"),
        "noise_scale.min_samples=4",
        *("batch_size=adaptive", "batch_size.geometry=euclidean", "batch_size.theta=0.5"),
        "batch_size.cap=12",
        *("checkpoint.every_steps=4", "metrics.progress=never", "metrics.log_every=1"),
        *("launch.device=cpu", "launch.threads=1", *more),
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, images) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert commands.run(words_of(folder, images), folder / "log") == 0
    return lines(folder, "images")


@pytest.mark.parametrize("more", [[], ["launch.nproc_per_node=2", "parallel=fsdp"]])
def test_killed_run_ends_with_the_lines_of_an_unbroken_one(more, unbroken, images, tmp_path):
    process = commands.start_and_hold(
        words_of(tmp_path, images), tmp_path, after_step=6, name="images"
    )
    commands.kill_group(process)
    (saved,) = checkpoint_folders(tmp_path / "images" / "checkpoints")
    assert saved.name == "step_00000004"
    assert commands.run(words_of(tmp_path, images, *more), tmp_path / "log") == 0
    found = lines(tmp_path, "images")
    assert any(line["kind"] == "batch_size" for line in unbroken)
    if more:
        assert_close(found, unbroken, "two ranks")
    else:
        assert found == unbroken


def test_checkpoint_holds_running_statistics_and_the_kind_of_model(images, tmp_path):
    config = image_run(tmp_path, images, "resnet", "single", epochs=0.4)
    assert launch(config) == 0
    (folder,) = checkpoint_folders(tmp_path / "resnet-single" / "checkpoints")
    metadata = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    names = metadata.state_dict_metadata
    assert "model.stem_norm.running_mean" in names
    assert "model.stem_norm.running_var" in names
    assert '"kind": "resnet"' in (folder / "model.json").read_text()
