"""Encoded images to arrays: parquet and folders give the same, bad ones are one line."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from datasets.features import ClassLabel
from PIL import Image
from pyarrow import parquet

from gns_pretrain.data.images import ImageSet
from gns_pretrain.data.prepare import images as module
from gns_pretrain.data.prepare.images import PrepareImagesSettings, prepare_images
from gns_pretrain.errors import InputError
from tests.image_folders import CLASSES, random_images


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "PORTION", 3)  # so that a split has several


def encoded(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


PIXELS, LABELS = random_images(7)
ROWS = [({"bytes": encoded(p), "path": None}, int(n)) for p, n in zip(PIXELS, LABELS, strict=True)]


def write_parquet(path: Path, rows=ROWS, columns=("img", "label")) -> str:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    arrays = [pyarrow.array([row[0] for row in rows], kind), pyarrow.array([r[1] for r in rows])]
    parquet.write_table(pyarrow.table(dict(zip(columns, arrays, strict=True))), path)
    return str(path)


def write_class_folders(folder: Path) -> str:
    for number, (image, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        of_class = folder / CLASSES[label]
        of_class.mkdir(parents=True, exist_ok=True)
        (of_class / f"{number}.png").write_bytes(encoded(image))
    (folder / CLASSES[0] / ".DS_Store").touch()
    return str(folder)


def prepared(tmp_path: Path, train: str, validation: str | None = None, **options) -> Path:
    settings = PrepareImagesSettings(
        out=str(tmp_path / "out"), train=[train], validation=[validation or train], **options
    )
    return Path(prepare_images(settings)["folder"])


def refused(tmp_path: Path, *arguments: str, **options) -> str:
    """The line; nothing is left behind."""
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    return str(caught.value)


def test_parquet_of_numbered_classes_is_decoded_without_loss(tmp_path):
    folder = prepared(tmp_path, write_parquet(tmp_path / "a.parquet"))
    images, labels = ImageSet.open(folder, "train", verify=True).read(np.arange(7))
    np.testing.assert_array_equal(images, PIXELS)
    np.testing.assert_array_equal(labels, LABELS)
    assert ImageSet.open(folder, "validation").classes == ("0", "1", "2")


def test_parquet_of_the_hub_has_the_names_of_its_classes(tmp_path):
    features = Features(
        {"x": Value("string"), "image": ImageFeature(), "y": ClassLabel(names=CLASSES)}
    )
    rows = [{"x": "", "image": image, "y": label} for image, label in ROWS]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub.parquet")
    folder = prepared(tmp_path, str(tmp_path / "hub.parquet"))
    opened = ImageSet.open(folder, "train", verify=True)
    assert opened.classes == CLASSES
    np.testing.assert_array_equal(opened.read(np.arange(7))[0], PIXELS)


def test_folders_of_classes_are_read_in_the_order_of_their_names(tmp_path):
    folder = prepared(tmp_path, write_class_folders(tmp_path / "in"))
    opened = ImageSet.open(folder, "train", verify=True)
    order = np.argsort(LABELS, kind="stable")
    np.testing.assert_array_equal(opened.read(np.arange(7))[0], PIXELS[order])
    np.testing.assert_array_equal(opened.read(np.arange(7))[1], LABELS[order])
    assert opened.classes == CLASSES


def test_globs_join_files(tmp_path):
    for name in ("b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", ROWS[:4] if name == "a" else ROWS[4:])
    folder = prepared(tmp_path, str(tmp_path / "?.parquet"))
    np.testing.assert_array_equal(ImageSet.open(folder, "train").read(np.arange(7))[0], PIXELS)


def test_size_takes_the_middle_square(tmp_path):
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    image[:, 2:6] = 200
    rows = [({"bytes": encoded(image), "path": None}, label) for label in (0, 1)]
    folder = prepared(tmp_path, write_parquet(tmp_path / "a.parquet", rows), size=4)
    read, _ = ImageSet.open(folder, "train").read(np.array([0]))
    np.testing.assert_array_equal(read, np.full((1, 4, 4, 3), 200))


@pytest.mark.parametrize(
    ("image", "kind"),
    [(Image.new("L", (6, 8), 9), "PNG"), (Image.new("P", (6, 8), 0), "GIF")],
)
def test_grey_and_palette_images_become_colours(tmp_path, image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    row = ({"bytes": buffer.getvalue(), "path": None}, 0)
    folder = prepared(tmp_path, write_parquet(tmp_path / "a.parquet", [*ROWS, row]))
    assert ImageSet.open(folder, "train").image_shape == (3, 8, 6)


def test_same_command_finds_the_folder_and_other_settings_are_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    folder = prepared(tmp_path, file)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepared(tmp_path, file, workers=1) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(InputError, match=r"--size=4, but .*out was made with None"):
        prepared(tmp_path, file, size=4)
    (folder / "meta.json").unlink()
    with pytest.raises(InputError, match=r"--out=.*out holds other files"):
        prepared(tmp_path, file)


def test_kill_leaves_no_folder_and_the_same_command_makes_it(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(module, "write_image_meta", lambda *_: os._exit(9))
    child = os.fork()
    if not child:
        prepared(tmp_path, file)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert ImageSet.open(prepared(tmp_path, file), "train", verify=True).num_images == 7
    assert not list(tmp_path.glob(".out*"))


DEEP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000


def bomb() -> bytes:
    """10 kB that are 81 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n(%pipe%touch x) (w) file\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (encoded(PIXELS[0])[:-60], r"row 6: its image cannot be decoded"),
        (b"", r"row 6: it is no image of JPEG, PNG"),
        (b"not an image", r"row 6: it is no image of JPEG, PNG"),
        (POSTSCRIPT, r"row 6: it is no image of JPEG, PNG"),
        (encoded(DEEP), r"row 6: its pixels have more than 8 bits \(mode I;16\)"),
        (bomb(), r"row 6: an image of 9000 x 9000 pixels; at most 67,108,864 are decoded"),
        (encoded(PIXELS[0, :4]), r"row 6: an image of 6 x 4 pixels, and others have 6 x 8; --size"),
    ],
)
def test_bad_image_is_one_line_with_file_and_row(tmp_path, content, says):
    rows = [*ROWS[:5], ({"bytes": content, "path": None}, 0)]
    line = refused(tmp_path, write_parquet(tmp_path / "a.parquet", rows))
    assert "a.parquet, " in line
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (({"bytes": None, "path": "/etc/hostname"}, 0), "row 6: its image has no bytes"),
        ((None, 0), "row 6: its image has no bytes"),
        ((ROWS[0][0], -1), "row 6: -1 is not the label of a class"),
        ((ROWS[0][0], None), "row 6: None is not the label of a class"),
        ((ROWS[0][0], 2**40), "row 6: 1099511627776 is not the label of a class"),
    ],
)
def test_row_without_image_or_label_is_named(tmp_path, row, says):
    assert says in refused(tmp_path, write_parquet(tmp_path / "a.parquet", [*ROWS[:5], row]))


def test_damaged_parquet_is_named(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet"))
    path.write_bytes(path.read_bytes()[:-40])
    assert "a.parquet cannot be opened" in refused(tmp_path, str(path))


def test_columns_that_do_not_fit_are_listed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", columns=("img", "weight"))
    assert "--label-column=label; its columns are img, weight" in refused(
        tmp_path, path, label_column="label"
    )
    assert prepared(tmp_path, path, label_column="weight").is_dir()


def test_folders_and_files_that_are_no_images_are_named(tmp_path):
    folder = Path(write_class_folders(tmp_path / "in"))
    (folder / "cat" / "notes.txt").touch()
    assert "notes.txt is not a file ending in .jpg" in refused(tmp_path, str(folder))
    (folder / "cat" / "notes.txt").rename(folder / "notes.txt")
    assert refused(tmp_path, str(folder)).endswith("nothing else; it holds notes.txt")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path, str(tmp_path / "empty")).endswith("nothing else; it holds nothing")
    (tmp_path / "a.txt").write_text("text")
    assert "a.txt is not a .parquet file" in refused(tmp_path, str(tmp_path / "a.txt"))


def test_a_single_class_is_refused(tmp_path):
    rows = [(image, 0) for image, _ in ROWS]
    line = "--train has one class alone, {}; a classifier needs two"
    assert refused(tmp_path, write_parquet(tmp_path / "a.parquet", rows)) == line.format("0")
    write_class_folders(tmp_path / "in")
    (tmp_path / "one").mkdir()
    (tmp_path / "in" / "cat").rename(tmp_path / "one" / "cat")
    assert refused(tmp_path, str(tmp_path / "one")) == line.format("cat")


def test_splits_with_other_classes_are_refused(tmp_path):
    folder = Path(write_class_folders(tmp_path / "in"))
    other = Path(write_class_folders(tmp_path / "other"))
    (other / "owl").rename(other / "pig")
    line = refused(tmp_path, str(folder), str(other))
    assert "--validation has the classes cat, dog, pig, and --train cat, dog, owl" in line


def test_sources_that_are_missing_name_the_option(tmp_path):
    with pytest.raises(InputError, match="--validation is missing"):
        PrepareImagesSettings(out=str(tmp_path / "out"), train=["a.parquet"])
    hub = PrepareImagesSettings(out=str(tmp_path / "out"), dataset="a/b", validation=["test"])
    assert (hub.train, hub.validation) == (["train"], ["test"])


def test_result_says_what_was_made(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    row = prepare_images(PrepareImagesSettings(str(tmp_path / "out"), [path], [path]))
    assert json.loads(json.dumps(row)) == row
    assert row["images"] == {"train": 7, "validation": 7}
    assert (row["status"], row["height"], row["width"], row["classes"]) == ("prepared", 8, 6, 3)
