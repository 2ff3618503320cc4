"""What a run on images refuses in one line, and what its header, batches and evaluation say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.averaging import AveragingSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.evaluate import EvaluationSettings
from gns_pretrain.workloads import open_workload
from tests.distributed.test_image_runs import MODELS, image_run
from tests.image_folders import write_images
from tests.settings import small_run

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", train=20, validation=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "epochs=None and sample_budget=None, but .* ends by one of them"),
        ({"sample_budget": 9}, "epochs=3.0 and sample_budget=9, but .* ends by one of them"),
        ({"epochs": 0.2}, "the budget of 4 images is less than one step's batch_size.initial=8"),
        ({"token_budget": 9}, "token_budget=9 is not read by a run on images; use .*=null"),
        (
            {"evaluation": EvaluationSettings(every_tokens=9)},
            "evaluation.every_tokens=9 is not read by a run on images",
        ),
        ({"model": replace(MODELS["vit"], patch_size=5)}, "model.patch_size=5 does not divide"),
        ({"data": DataSettings("embedded")}, "model.name=odd is not made for data.path=embedded"),
    ],
)
def test_setting_that_does_not_fit_is_refused_in_one_line(changes, message, images, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        open_workload(replace(image_run(tmp_path, images, "vit", "single"), **changes))
    assert "\n" not in str(refused.value)


def test_average_beside_running_statistics_is_refused_before_a_run_begins(images, tmp_path):
    config = image_run(tmp_path, images, "resnet", "single")
    open_workload(config).check()
    averaged = replace(config, averaging=AveragingSettings("ema", decay=0.9))
    with pytest.raises(InputError, match=r"running statistics .*use averaging=none"):
        open_workload(averaged).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3.0}, "epochs=3.0 is not read by a run on text; use epochs=null"),
        (
            {"noise_scale": NoiseScaleSettings(["euclidean"], every_epochs=1.0)},
            "noise_scale.every_epochs=1.0 is not read by a run on text",
        ),
        ({"token_budget": None}, "token_budget has no value, by which a run on text ends"),
    ],
)
def test_run_on_text_refuses_settings_of_images(changes, message, tmp_path, shards):
    with pytest.raises(InputError, match=message):
        open_workload(small_run(tmp_path, shards, **changes))


def test_digits_stand_for_a_folder_that_is_not_there_and_the_header_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = ImageDataSettings(path=str(tmp_path / "nowhere"), or_embedded=True, num_images=100)
    config = replace(image_run(tmp_path, tmp_path, "resnet", "single"), data=data)
    described = open_workload(config).describe("cpu")
    assert described.data == (
        f"{tmp_path}/nowhere is not there, so the embedded digits, 100 images of 8 x 8 x 1 in 10 "
        "classes; the budget of 300 is 3 epochs"
    )
    with pytest.raises(InputError, match="nowhere is not a folder of images"):
        open_workload(replace(config, data=replace(data, or_embedded=False)))


def test_batches_are_those_of_their_positions_on_any_number_of_ranks(images, tmp_path):
    def taken(rank, num_ranks):
        config = image_run(
            tmp_path, images, "vit", "single", batch_size=BatchSizeSettings(initial=8)
        )
        workload = open_workload(config)
        world = World(rank, num_ranks, torch.device("cpu"), "ddp")
        workload.begin(world)
        found = [*workload.micro_batches(16, batch_size=8, micro_batch_size=2)]
        workload.close()
        return found

    whole = taken(0, 1)
    assert [inputs.shape for inputs, _ in whole] == [(2, 3, 8, 6)] * 4
    for rank in (0, 1):
        for ours, theirs in zip(taken(rank, 2), whole[rank::2], strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_evaluation_goes_by_running_statistics_and_leaves_the_model_training(images, tmp_path):
    workload = open_workload(image_run(tmp_path, images, "resnet", "single"))
    workload.begin(ALONE)
    model = workload.build_model(ALONE)
    found = workload.evaluate(model, chunk=2, world=ALONE)
    workload.close()
    pictures, labels = workload.validation.read_in_order(0, 7)
    logits = model.eval()(pictures)
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert found.more["accuracy"] == pytest.approx(np.mean((logits.argmax(1) == labels).numpy()))
    model.train()
    assert found.loss != pytest.approx(model(pictures, labels).item())
