import json
import os
from pathlib import Path

import pytest
import torch

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training import checkpoint
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, damage, load_model
from tests.settings import odd_model

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


def built() -> tuple[Llama, torch.optim.Optimizer]:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    return model, AdamWSettings().build(model)


def stepped(model: Llama, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(17).view(1, 17)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(folder: Path, *steps: int, keep: int = 2) -> tuple[Llama, torch.optim.Optimizer]:
    model, optimizer = built()
    checkpoints = Checkpoints(folder, keep=keep, world=ALONE)
    for step in steps:
        stepped(model, optimizer)
        state = {"step": step, "samples": 8 * step}
        checkpoints.save(model, optimizer, state)
    return model, optimizer


def loaded(folder: Path) -> tuple[dict | None, list[str], Llama]:
    model, optimizer = built()
    state, damaged = Checkpoints(folder, keep=2, world=ALONE).load_latest(model, optimizer)
    return state, damaged, model


def largest_file(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def test_model_optimizer_state_and_generator_come_back_bit_for_bit(tmp_path):
    model, optimizer = save_steps(tmp_path, 1, 2)
    expected_draw = torch.rand(3)
    other, other_optimizer = built()
    torch.manual_seed(99)
    state, damaged = Checkpoints(tmp_path, keep=2, world=ALONE).load_latest(other, other_optimizer)
    assert damaged == []
    assert state == {"step": 2, "samples": 16}
    torch.testing.assert_close(torch.rand(3), expected_draw, rtol=0, atol=0)
    for net, rule in ((model, optimizer), (other, other_optimizer)):
        stepped(net, rule)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_newest_are_kept_and_older_ones_go(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step_00000004", "step_00000003"]


def test_damaged_newer_checkpoint_does_not_take_the_place_of_the_one_just_written(tmp_path):
    save_steps(tmp_path, 1, 3, keep=2)
    remove_the_manifest(tmp_path / "step_00000003")
    save_steps(tmp_path, 2, keep=1)
    state, damaged, _ = loaded(tmp_path)
    assert state is not None
    assert state["step"] == 2
    assert len(damaged) == 1
    assert not (tmp_path / "step_00000001").exists()


def test_old_checkpoint_that_cannot_be_deleted_ends_no_run_and_goes_later(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        # As on NFS, where a file that somebody still reads stays under another name.
        patch.setattr(os, "rmdir", busy)
        save_steps(tmp_path, 2, keep=1)
    assert (tmp_path / "step_00000001").is_dir()
    save_steps(tmp_path, 3, keep=1)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step_00000003"]


def busy(path, **keywords) -> None:
    raise OSError(39, "Directory not empty", str(path))


def flip_a_byte(folder: Path) -> None:
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size - 1)


def remove_a_file(folder: Path) -> None:
    largest_file(folder).unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("harm", [flip_a_byte, truncate, remove_a_file, remove_the_manifest])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, harm):
    save_steps(tmp_path, 1, 2)
    harm(tmp_path / "step_00000002")
    state, damaged, _ = loaded(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert len(damaged) == 1
    assert "step_00000002 is damaged" in damaged[0]


def test_run_with_only_damaged_checkpoints_does_not_start_over_by_itself(tmp_path):
    save_steps(tmp_path, 1)
    flip_a_byte(tmp_path / "step_00000001")
    with pytest.raises(TrainingError, match=r"no whole checkpoint is left .*resume=never"):
        loaded(tmp_path)


def test_damaged_checkpoint_of_the_same_step_is_set_aside_not_deleted(tmp_path):
    save_steps(tmp_path, 1)
    flip_a_byte(tmp_path / "step_00000001")
    save_steps(tmp_path, 1)
    assert damage(tmp_path / "step_00000001") is None
    assert (tmp_path / "damaged_1_step_00000001").is_dir()


def test_unfinished_save_is_not_a_checkpoint_and_is_cleared_by_the_next(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / ".unfinished_step_00000002").mkdir()
    state, damaged, _ = loaded(tmp_path)
    assert (state["step"] if state else None, damaged) == (1, [])
    save_steps(tmp_path, 3)
    assert not list(tmp_path.glob(".unfinished_*"))


@pytest.mark.parametrize("failing", ["dcp", "manifest"])
def test_full_disk_while_saving_leaves_the_older_checkpoint_usable(tmp_path, monkeypatch, failing):
    save_steps(tmp_path, 1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "dcp":
            patch.setattr(checkpoint.dcp, "save", full)
        else:
            patch.setattr(checkpoint, "seal", full)
        with pytest.raises(TrainingError, match=r"step 2: .*No space left.*step_00000001 is whole"):
            save_steps(tmp_path, 2)
    state, damaged, _ = loaded(tmp_path)
    assert (state["step"] if state else None, damaged) == (1, [])


def test_model_alone_loads_from_a_checkpoint_folder(tmp_path):
    model, _ = save_steps(tmp_path, 1)
    again = load_model(tmp_path / "step_00000001")
    assert again.config == model.config
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"not a whole checkpoint .*name a step_\* folder"):
        load_model(tmp_path)


def test_manifest_lists_every_other_file(tmp_path):
    save_steps(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
