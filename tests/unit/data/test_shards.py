import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gns_pretrain.data.shards import TokenShards, read_meta
from gns_pretrain.errors import InputError
from tests.conftest import write_shards


@pytest.fixture
def folder(tmp_path) -> Path:
    """Tokens 0 to 11 in shards of 5, 1 and 6."""
    tokens = np.arange(12, dtype=np.uint16)
    return write_shards(tmp_path / "shards", {"train": [tokens[:5], tokens[5:6], tokens[6:]]}, 100)


def edit_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_sequences_run_over_shard_boundaries(folder):
    out = np.empty((3, 5), dtype=np.int64)
    TokenShards.open(folder, "train").read_sequences(np.array([1, 0, 1]), 4, out)
    assert out.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_read_returns_any_range(folder):
    split = TokenShards.open(folder, "train")
    for start in range(12):
        for stop in range(start + 1, 13):
            assert split.read(start, stop).tolist() == list(range(start, stop))
    assert split.read(0, 2).dtype == np.uint16


@pytest.mark.parametrize(("length", "sequences"), [(11, 1), (12, 0), (5, 2), (6, 1), (1, 11)])
def test_last_sequence_needs_a_target(folder, length, sequences):
    # 12 tokens: 11 have a successor.
    assert TokenShards.open(folder, "train").num_sequences(length) == sequences


def test_fingerprint_follows_the_tokens_not_the_folder(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    other = write_shards(tmp_path / "other", {"train": [np.arange(1, 13, dtype=np.uint16)]}, 100)
    here, there, different = (
        TokenShards.open(path, "train").fingerprint for path in (folder, moved, other)
    )
    assert here == there != different


def truncate(folder: Path) -> None:
    path = folder / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(folder: Path) -> None:
    with (folder / "train-00000.npy").open("ab") as file:
        file.write(b"\0\0")


def empty(folder: Path) -> None:
    (folder / "train-00000.npy").write_bytes(b"")


def remove(folder: Path) -> None:
    (folder / "train-00000.npy").unlink()


def widen(folder: Path) -> None:
    np.save(folder / "train-00000.npy", np.arange(5, dtype=np.uint32))


def shorten(folder: Path) -> None:
    np.save(folder / "train-00000.npy", np.arange(4, dtype=np.uint16))


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, remove, widen, shorten])
def test_damaged_shard_is_named(folder, damage):
    damage(folder)
    with pytest.raises(InputError, match=r"train-00000\.npy"):
        TokenShards.open(folder, "train")


def test_altered_shard_is_found_by_its_hash_alone(folder):
    path = folder / "train-00002.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    TokenShards.open(folder, "train")
    with pytest.raises(InputError, match=r"train-00002\.npy was altered"):
        TokenShards.open(folder, "train", verify=True)


def test_missing_split_is_named_with_those_there_are(folder):
    with pytest.raises(InputError, match=r"split=validation is not in .*meta\.json; it has train"):
        TokenShards.open(folder, "validation")


def test_token_past_the_vocabulary_is_named_with_its_shard_and_place(folder):
    edit_meta(folder, vocab_size=9)
    split = TokenShards.open(folder, "train")
    out = np.empty((1, 4), dtype=np.int64)
    split.read_sequences(np.array([1]), 3, out)
    # Sequence 2 holds the tokens 6 to 9; token 9 is the fourth of the third shard.
    with pytest.raises(InputError, match=r"train-00002\.npy holds the token id 9 at position 3"):
        split.read_sequences(np.array([2]), 3, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int64"}, "dtype=int64"),
        ({"vocab_size": "many"}, "wrong type"),
        (
            {"shards": [{"file": "a.npy", "split": "train", "tokens": 3}]},
            "lacks the entry 'sha256'",
        ),
        ({"shards": [{"file": "a.npy", "split": "train", "tokens": 0, "sha256": ""}]}, "is empty"),
        ({"shards": 3}, "wrong type"),
    ],
)
def test_wrong_meta_is_named(folder, changes, message):
    edit_meta(folder, **changes)
    with pytest.raises(InputError, match=rf"meta\.json.*{message}"):
        read_meta(folder)


def test_meta_that_is_no_json_is_named(folder):
    (folder / "meta.json").write_text("{")
    with pytest.raises(InputError, match=r"meta\.json is not valid JSON"):
        read_meta(folder)


def test_half_prepared_folder_is_distinguished_from_a_wrong_one(tmp_path):
    with pytest.raises(InputError, match="is not a token-shard folder"):
        read_meta(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(InputError, match="half prepared"):
        read_meta(tmp_path)


def test_tokenizer_other_than_that_of_the_shards_is_refused(folder):
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # sha256 of "a"
    edit_meta(folder, tokenizer="tokenizer.json", tokenizer_sha256=digest)
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        TokenShards.open(folder, "train")
    (folder / "tokenizer.json").write_text("b")
    with pytest.raises(InputError, match=r"tokenizer\.json does not match"):
        TokenShards.open(folder, "train")
    (folder / "tokenizer.json").write_text("a")
    TokenShards.open(folder, "train")
