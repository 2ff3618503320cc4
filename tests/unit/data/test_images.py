"""Image folders: read as written, damage named in one line, augmented by position alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gns_pretrain.data import embedded_images
from gns_pretrain.data.augmentation import (
    NUM_DRAWS,
    AugmentationSettings,
    augmented,
    cut_resized,
    resized_boxes,
    shifted,
)
from gns_pretrain.data.embedded_images import ensure_embedded_images
from gns_pretrain.data.images import ImageSet, PixelSums, TrainingImages
from gns_pretrain.data.order import uniforms
from gns_pretrain.data.shards import read_meta
from gns_pretrain.errors import InputError
from tests.conftest import write_shards
from tests.image_folders import CLASSES, SHAPE, random_images, write_images

PLAIN = AugmentationSettings(crop="none", flip=False)
VARIED = [
    AugmentationSettings(),
    AugmentationSettings(crop="resized"),
    AugmentationSettings(crop="pad", padding=2, flip=False),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def test_split_is_read_as_it_was_written_by_numpy_too(folder):
    images, labels = random_images(20)
    opened = ImageSet.open(folder, "train", verify=True)
    assert (opened.num_images, opened.image_shape, opened.classes) == (20, (3, 8, 6), CLASSES)
    read = opened.read(np.array([3, 0, 19]))
    np.testing.assert_array_equal(read[0], images[[3, 0, 19]])
    np.testing.assert_array_equal(read[1], labels[[3, 0, 19]])
    np.testing.assert_array_equal(np.load(folder / "train_images.npy"), images)


def test_training_images_are_normalised_to_mean_0_and_deviation_1(folder):
    images, labels = ImageSet.open(folder, "train").read_in_order(0, 20)
    assert (images.shape, images.dtype, labels.dtype) == ((20, 3, 8, 6), torch.float32, torch.int64)
    assert images.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))


def test_pixel_sums_are_those_of_all_parts_at_once():
    images, _ = random_images(9)
    sums = PixelSums(3)
    for part in (images[:2], images[2:]):
        sums.add(part)
    mean, deviation = sums.mean_and_deviation()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(deviation, (images / 255).std((0, 1, 2)))
    constant = PixelSums(3)
    constant.add(np.full((2, *SHAPE), 7, dtype=np.uint8))
    assert constant.mean_and_deviation()[1] == (1.0, 1.0, 1.0)


def test_fingerprint_follows_the_images_not_the_folder(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    other = write_images(tmp_path / "other", train=21)
    here, there, different = (
        ImageSet.open(path, "train").fingerprint for path in (folder, moved, other)
    )
    assert here == there != different


def test_subset_is_evenly_spaced_and_has_a_fingerprint_of_its_own(folder):
    whole = ImageSet.open(folder, "train")
    part = whole.subset(5)
    assert part.num_images == 5
    np.testing.assert_array_equal(
        part.read(np.arange(5))[0], whole.read(np.array([0, 4, 8, 12, 16]))[0]
    )
    assert part.fingerprint != whole.fingerprint == whole.subset(20).fingerprint


def cut_short(folder: Path) -> str:
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-1])
    return r"train_images\.npy is truncated"


def lengthen(folder: Path) -> str:
    with (folder / "train_labels.npy").open("ab") as file:
        file.write(b"\0")
    return r"train_labels\.npy is longer than its header says"


def alter(folder: Path) -> str:
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    return r"train_images\.npy was altered"


def remove(folder: Path) -> str:
    (folder / "train_labels.npy").unlink()
    return r"train_labels\.npy is missing"


def pickle(folder: Path) -> str:
    np.save(folder / "train_labels.npy", np.array([{}] * 20), allow_pickle=True)
    return r"train_labels\.npy holds object\[20\], but meta\.json says int64\[20\]"


def transpose(folder: Path) -> str:
    np.save(folder / "train_images.npy", np.asfortranarray(random_images(20)[0]))
    return r"not a \.npy file \(its elements are in Fortran's order\)"


def relabel(folder: Path) -> str:
    np.save(folder / "train_labels.npy", np.array([0] * 19 + [3]))
    return r"train_labels\.npy was altered"


def edit(folder: Path, change) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def flatten(folder: Path) -> str:
    edit(folder, lambda meta: meta.update(deviation=[0.0, 0.1, 0.1]))
    return r"meta\.json: deviation=\[0\.0, 0\.1, 0\.1\] must be positive"


def lose_a_channel(folder: Path) -> str:
    edit(folder, lambda meta: meta.update(mean=[0.5]))
    return r"meta\.json: classes, mean or deviation are not complete"


def lead_out(folder: Path) -> str:
    edit(folder, lambda meta: meta["splits"]["train"].update(images="../train_images.npy"))
    return r"not a name inside its folder"


def retype(folder: Path) -> str:
    edit(folder, lambda meta: meta.update(height="8"))
    return r"meta\.json holds an entry of the wrong type"


def cut_meta(folder: Path) -> str:
    (folder / "meta.json").write_text("{")
    return r"meta\.json is not valid JSON"


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        lengthen,
        alter,
        remove,
        pickle,
        transpose,
        relabel,
        flatten,
        lose_a_channel,
        lead_out,
        retype,
        cut_meta,
    ],
)
def test_damaged_folder_is_one_line_that_names_the_file(folder, damage):
    says = damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        ImageSet.open(folder, "train", verify=None)
    assert "\n" not in str(caught.value)


def test_label_that_is_no_class_is_found_without_hashing(folder):
    relabel(folder)
    with pytest.raises(InputError, match=r"holds the label 3 at position 19, but .* 3 classes"):
        ImageSet.open(folder, "train", verify=False)


def test_missing_split_and_folder_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"data.train_split=test is not in .*train, validation"):
        ImageSet.open(folder, "test", setting="data.train_split")
    with pytest.raises(InputError, match="prepare-images"):
        ImageSet.open(tmp_path, "train")


def test_folders_of_text_and_of_images_are_told_apart(folder, tmp_path):
    text = write_shards(tmp_path / "text", {"train": [np.arange(5, dtype=np.uint16)]}, 100)
    with pytest.raises(InputError, match=r"text.meta\.json is not of images, but of text"):
        ImageSet.open(text, "train")
    with pytest.raises(InputError, match=r"images.meta\.json is of images, not of text"):
        read_meta(folder)


def test_shift_and_flip_by_hand():
    image = np.arange(1, 7, dtype=np.uint8).reshape(1, 2, 3, 1)  # 1 2 3 / 4 5 6

    def moved(down: int, right: int, flip: bool) -> list[list[int]]:
        arguments = (np.array([value]) for value in (down, right, flip))
        return shifted(image, *arguments)[0, :, :, 0].tolist()

    assert moved(0, 0, False) == [[1, 2, 3], [4, 5, 6]]
    assert moved(0, 0, True) == [[3, 2, 1], [6, 5, 4]]
    assert moved(1, -1, False) == [[0, 4, 5], [0, 0, 0]]
    assert moved(0, 1, True) == [[0, 3, 2], [0, 6, 5]]


def test_resized_crop_by_hand():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    whole = np.array([[0.0], [0.0], [1.0], [1.0]])
    flip = np.array([True])
    assert cut_resized(image, whole, ~flip)[0, 0].tolist() == image[0, :, :, 0].tolist()
    assert cut_resized(image, whole, flip)[0, 0, 0].tolist() == [3, 2, 1, 0]
    # The lower right quarter, [[10, 11], [14, 15]]: four columns between its edges at 2 and 4.
    quarter = np.array([[0.5], [0.5], [0.5], [0.5]])
    row = cut_resized(image, quarter, ~flip)[0, 0, 3]
    torch.testing.assert_close(row, torch.tensor([13.75, 14.25, 14.75, 15.0]))


def test_boxes_stay_inside_and_have_the_drawn_area():
    draws = uniforms(0, np.arange(4_000), 4)
    top, left, height, width = resized_boxes(draws, 0.25)
    assert min(top.min(), left.min()) >= 0.0
    assert max((top + height).max(), (left + width).max()) <= 1.0
    assert (height * width).min() >= 0.25 * 0.999
    free = (height < 1) & (width < 1)
    np.testing.assert_allclose((height * width)[free], (0.25 + 0.75 * draws[0])[free])
    assert 3 / 4 <= (width / height).min() < 0.8 < 1.25 < (width / height).max() <= 4 / 3


def test_draws_are_uniform_and_apart_for_neighbours_and_seeds():
    draws = uniforms(3, np.arange(10_000), 3)
    # Four standard errors: sqrt(1 / 12 / 10,000) = 0.0029 of a mean, 0.01 of a correlation.
    np.testing.assert_allclose(draws.mean(1), 0.5, atol=4 * 0.0029)
    others = [draws[0, 1:], draws[1, :-1], uniforms(4, np.arange(9_999), 1)[0]]
    for other in others:
        assert abs(np.corrcoef(draws[0, :-1], other)[0, 1]) < 4 * 0.01
    assert 0.0 <= draws.min() < draws.max() < 1.0


def test_settings_choose_what_is_done():
    images, _ = random_images(64)
    draws = uniforms(0, np.arange(64), NUM_DRAWS)
    plain = augmented(images, draws, PLAIN)
    np.testing.assert_array_equal(plain.permute(0, 2, 3, 1).numpy(), images)
    flipped = augmented(images, draws, AugmentationSettings(crop="none"))
    same = (flipped == plain).flatten(1).all(1)
    assert 16 < same.sum() < 48  # 32, four standard deviations of 4
    assert torch.equal(flipped[~same], plain[~same].flip(3))
    eighth = AugmentationSettings(padding=SHAPE[0] // 8)  # what null stands for
    assert torch.equal(
        augmented(images, draws, AugmentationSettings()), augmented(images, draws, eighth)
    )
    for settings in VARIED:
        made = augmented(images, draws, settings)
        assert made.shape == plain.shape
        assert 0 <= made.min() < made.max() <= 255


@pytest.mark.parametrize("settings", VARIED, ids=str)
def test_training_images_depend_on_the_position_alone(folder, settings):
    images = ImageSet.open(folder, "train")
    whole = TrainingImages(images, settings, seed=2).read(np.arange(60).reshape(3, 5, 4))
    assert whole[0].shape == (3, 5, 4, 3, 8, 6)
    again = TrainingImages(images, settings, seed=2)
    for place in ([2, 1], [0, 3]):  # as another rank, or a run resumed there, reads them
        positions = 20 * place[0] + 4 * place[1] + np.arange(4)
        part = again.read(positions)
        assert torch.equal(part[0], whole[0][tuple(place)])
        assert torch.equal(part[1], whole[1][tuple(place)])
    other = TrainingImages(images, settings, seed=3).read(np.arange(60))
    assert not torch.equal(other[0], whole[0].flatten(0, 2))


def test_each_epoch_has_every_image_once_and_varies_it(folder):
    images = ImageSet.open(folder, "train")
    plain = TrainingImages(images, PLAIN, seed=0)
    whole, _ = images.read_in_order(0, 20)
    for epoch in (0, 1):
        seen, _ = plain.read(20 * epoch + np.arange(20))
        found = (seen[:, None] == whole).flatten(2).all(2)
        assert found.sum(0).tolist() == found.sum(1).tolist() == [1] * 20
    varied = TrainingImages(images, AugmentationSettings(), seed=0)
    places = np.flatnonzero(varied.order(np.arange(40)) == 0)  # of one image in both epochs
    first, second = varied.read(places)[0]
    assert not torch.equal(first, second)


def test_embedded_images_are_scikit_learns_digits_made_once(tmp_path, monkeypatch):
    folder = ensure_embedded_images(tmp_path)
    training, validation = (ImageSet.open(folder, s, verify=True) for s in ("train", "validation"))
    assert (training.num_images, validation.num_images) == (1_500, 297)
    assert (training.image_shape, training.num_classes) == ((1, 8, 8), 10)
    monkeypatch.setattr(embedded_images, "_make", None)
    assert ensure_embedded_images(tmp_path) == folder
