import os
import shutil

import numpy as np
import pytest

from gns_pretrain.data import staging
from gns_pretrain.data.settings import DataSettings, open_splits
from gns_pretrain.data.staging import compile_cache, staged
from gns_pretrain.errors import InputError


def staged_copy(shards, tmp_path, **changes):
    logged: list[str] = []
    settings = DataSettings(
        path=str(shards), sequence_length=16, stage_to=str(tmp_path / "disk"), **changes
    )
    return staged(settings, log=logged.append), logged


def test_copy_holds_the_same_tokens_and_is_made_once(shards, tmp_path):
    settings, logged = staged_copy(shards, tmp_path)
    assert settings.path.startswith(str(tmp_path / "disk" / "shards-"))
    assert len(logged) == 1
    original, copy = (
        open_splits(DataSettings(path=path, sequence_length=16))[0]
        for path in (str(shards), settings.path)
    )
    assert copy.fingerprint == original.fingerprint
    copied, there = (mixture.sources[0].tokens.read(0, 3000) for mixture in (copy, original))
    np.testing.assert_array_equal(copied, there)
    assert staged_copy(shards, tmp_path)[1] == []


def test_altered_original_is_refused_and_leaves_no_copy(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    victim = folder / "train-00001.npy"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00001.npy was altered: its sha256"):
        staged_copy(folder, tmp_path)
    assert not list((tmp_path / "disk").rglob("train-00001.npy"))
    assert not list((tmp_path / "disk").rglob("meta.json"))


def test_truncated_copy_is_made_again(shards, tmp_path):
    staged_copy(shards, tmp_path)
    victim = next(iter((tmp_path / "disk").rglob("train-00000.npy")))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-8])
    assert len(staged_copy(shards, tmp_path)[1]) == 1
    assert victim.read_bytes() == whole


@pytest.mark.parametrize(("verify", "copies"), [(None, 0), (True, 1)])
def test_altered_copy_is_made_again_where_sums_are_asked_for(verify, copies, shards, tmp_path):
    staged_copy(shards, tmp_path)
    victim = next(iter((tmp_path / "disk").rglob("train-00000.npy")))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(staged_copy(shards, tmp_path, verify=verify)[1]) == copies
    assert (victim.read_bytes() == whole) is (copies == 1)


def test_folder_that_cannot_be_made_is_named(shards, tmp_path):
    (tmp_path / "disk").touch()
    with pytest.raises(InputError, match=r"data.stage_to=.*disk: .* cannot be written \("):
        staged_copy(shards, tmp_path)


def test_disk_that_is_too_small_is_named_before_anything_is_copied(shards, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"data.stage_to=.* has 0.0 GB free"):
        staged_copy(shards, tmp_path)


def test_folder_may_come_from_the_nodes_environment(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    settings = DataSettings(path=str(shards), stage_to="$NODE_DISK/x")
    assert staged(settings, log=lambda line: None).path.startswith(str(tmp_path / "x"))
    with pytest.raises(InputError, match=r"data.stage_to=\$ABSENT names a variable"):
        staged(DataSettings(path=str(shards), stage_to="$ABSENT"))


def test_compile_cache_begins_with_what_is_kept_and_keeps_what_is_new(tmp_path, monkeypatch):
    for variable in staging.CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    shared = tmp_path / "shared"
    (shared / "inductor").mkdir(parents=True)
    (shared / "inductor" / "old").write_text("kernel")
    with compile_cache(str(shared), str(tmp_path / "disk"), keep=True):
        local = tmp_path / "disk" / "compile-cache" / "inductor"
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(local)
        assert (local / "old").read_text() == "kernel"
        (local / "new").write_text("another")
    assert (shared / "inductor" / "new").read_text() == "another"
    for variable in staging.CACHE_VARIABLES:
        monkeypatch.delenv(variable)


def test_shared_folder_that_takes_nothing_costs_a_line_and_not_the_run(tmp_path, monkeypatch):
    for variable in staging.CACHE_VARIABLES:
        monkeypatch.setenv(variable, "")  # put back at the end
        monkeypatch.delenv(variable)
    shared = tmp_path / "shared"
    logged: list[str] = []
    with compile_cache(str(shared), str(tmp_path / "disk"), keep=True, log=logged.append):
        local = tmp_path / "disk" / "compile-cache" / "inductor"
        local.mkdir(parents=True)
        (local / "new").write_text("kernel")
        shared.touch()  # a file where the folder should be
    (line,) = logged
    assert line.startswith(f"launch.compile_cache={shared} could not take what was compiled: ")
    for variable in staging.CACHE_VARIABLES:
        monkeypatch.delenv(variable)
