from pathlib import Path

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.system.files import folder_lock, read_json, remove_temporaries, write_whole


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_new_content_appears_by_renaming_a_whole_file(path, monkeypatch):
    renamed = []
    monkeypatch.setattr(
        Path, "replace", lambda source, target: renamed.append((source.read_bytes(), target))
    )
    write_whole(path, lambda file: file.write(b"new"))
    assert renamed == [(b"new", path)]
    assert path.read_bytes() == b"old"


def test_failed_write_leaves_the_old_file_and_nothing_else(path):
    def fail(file):
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_temporaries_of_a_killed_process_are_removed_and_nothing_else(path):
    (path.parent / ".file.n1-7.tmp").write_bytes(b"half")
    remove_temporaries(path.parent)
    assert list(path.parent.iterdir()) == [path]


def test_lock_is_held_once_and_released(tmp_path):
    with folder_lock(tmp_path, wait=False) as first, folder_lock(tmp_path, wait=False) as second:
        assert (first, second) == (True, False)
    with folder_lock(tmp_path, wait=False) as third:
        assert third


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_file_that_holds_no_json_object_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        read_json(path, hint="restore it")


def test_two_machines_write_one_file_beside_each_other(path, monkeypatch):
    def elsewhere(file):
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        write_whole(path, lambda other: other.write(b"theirs"))
        file.write(b"ours")

    write_whole(path, elsewhere)
    assert path.read_bytes() == b"ours"
    assert list(path.parent.iterdir()) == [path]
