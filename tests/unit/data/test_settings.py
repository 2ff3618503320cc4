import shlex
from pathlib import Path

import numpy as np
import pytest

from gns_pretrain.data import settings as settings_module
from gns_pretrain.data import shards as shards_module
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.settings import DataSettings, open_splits
from gns_pretrain.errors import InputError
from gns_pretrain.fields import add_options, from_options, script_parser
from tests.conftest import write_shards


@pytest.fixture
def folder(tmp_path) -> Path:
    """101 training tokens and 11 for validation."""
    splits = {
        "train": [np.arange(101, dtype=np.uint16)],
        "validation": [np.arange(11, dtype=np.uint16)],
    }
    return write_shards(tmp_path / "shards", splits, 200)


def settings_for(folder: Path, **changes) -> DataSettings:
    return DataSettings(**{"path": str(folder), "sequence_length": 10, **changes})


def test_splits_are_opened_by_name(folder):
    training, validation = open_splits(settings_for(folder))
    assert (training.num_tokens, validation.num_tokens) == (101, 11)
    training, validation = open_splits(
        settings_for(folder, train_split="validation", validation_split="train")
    )
    assert (training.num_tokens, validation.num_tokens) == (11, 101)


def test_embedded_names_no_folder(folder, monkeypatch):
    monkeypatch.setattr(settings_module, "ensure_embedded", lambda vocab_size: folder)
    training, _ = open_splits(DataSettings(path="embedded", sequence_length=10))
    assert training.num_tokens == 101


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "data.path=nowhere is not a folder"),
        ({"train_split": "tarin"}, "data.train_split=tarin .* it has train, validation"),
        ({"validation_split": "test"}, "data.validation_split=test .* it has train, validation"),
        ({"validation_split": "train"}, "data.validation_split=train is also data.train_split"),
        ({"sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
        (
            {"embedded_vocab_size": 257},
            "data.embedded_vocab_size=257 must be at least 258; all bytes and two special tokens",
        ),
        ({"sequence_length": 11}, "data.sequence_length=11 .* 11 tokens of the split validation"),
        ({"sequence_length": 101}, "data.sequence_length=101 .* 101 tokens of the split train"),
    ],
)
def test_settings_that_the_data_cannot_meet_are_named(folder, changes, message):
    with pytest.raises(InputError, match=message):
        open_splits(settings_for(folder, **changes))


@pytest.mark.parametrize(
    ("name", "given", "pattern"),
    [("a.json.gz", "text", "text/*.json.gz"), ("b.txt", "text/b.txt", "text/b.txt")],
)
def test_text_in_place_of_shards_comes_with_the_command_that_makes_them(
    tmp_path, monkeypatch, name, given, pattern
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).touch()
    (tmp_path / "text" / "notes.md").touch()
    with pytest.raises(InputError) as error:
        open_splits(settings_for(Path(given)))
    command = str(error.value).partition("gns-pretrain prepare-data ")[2].partition(" makes")[0]
    parser = script_parser("")
    add_options(parser, PrepareSettings)
    options = parser.parse_args(shlex.split(command))
    assert from_options(PrepareSettings, options).train == [pattern]


def test_documents_without_a_token_around_them_cannot_be_told_apart(folder):
    (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"eos_id": 0', '"eos_id": null')
    )
    training, _ = open_splits(settings_for(folder, document_mask=True))
    with pytest.raises(InputError, match=r"data.document_mask=true needs a token .*meta\.json has"):
        _ = training.document_ids


def alter(folder: Path) -> None:
    path = folder / "validation-00000.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_small_data_is_verified_by_default(folder, monkeypatch):
    alter(folder)
    with pytest.raises(InputError, match=r"validation-00000\.npy was altered"):
        open_splits(settings_for(folder))
    open_splits(settings_for(folder, verify=False))
    monkeypatch.setattr(shards_module, "VERIFY_BELOW_BYTES", 22)  # the validation shard's size
    open_splits(settings_for(folder))
    with pytest.raises(InputError, match=r"validation-00000\.npy was altered"):
        open_splits(settings_for(folder, verify=True))
