"""Checkpoints on object storage, with fsspec's store in memory in place of one elsewhere."""

import argparse
import pickle
import secrets
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gns_pretrain.commands import export_hf
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch import measure_noise
from gns_pretrain.runs.directory import is_finished
from gns_pretrain.system.remote import folder_at
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training import checkpoint, checkpoint_reader
from gns_pretrain.training.checkpoint import Checkpoints, CheckpointSettings
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, damage, load_model
from tests.runs import ALONE, train_here
from tests.settings import SEQUENCE_LENGTH, small_run, without_times
from tests.unit.training.test_checkpoint import built, stepped

pytest.importorskip("upath", reason="needs the extra: pip install 'gns-pretrain[remote]'")


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{secrets.token_hex(4)}/prefix"


@pytest.fixture
def store(url) -> Path:
    return folder_at(url, "checkpoint.directory")


def save_steps(store: Path, *steps: int) -> torch.nn.Module:
    model, optimizer = built()
    checkpoints = Checkpoints(store, keep=2, world=ALONE, beside=ALONE)
    for step in steps:
        stepped(model, optimizer)
        checkpoints.save(model, optimizer, {"step": step})
    checkpoints.wait()
    checkpoints.close()
    return model


def loaded_step(store: Path) -> tuple[int | None, list[str]]:
    state, damaged = Checkpoints(store, keep=2, world=ALONE).load_latest(*built())
    return state and state["step"], damaged


def names_of(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def test_newest_are_kept_and_load_bit_for_bit(store):
    model = save_steps(store, 1, 2, 3)
    assert names_of(store) == ["step_00000002", "step_00000003"]
    assert loaded_step(store) == (3, [])
    again = load_model(store / "step_00000003")
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_folder_without_manifest_is_no_checkpoint_and_is_cleared_by_the_next(store):
    save_steps(store, 1, 2)
    (store / "step_00000002" / "manifest.json").unlink()  # as of a kill before it was written
    assert loaded_step(store) == (1, [])
    save_steps(store, 3)
    assert names_of(store) == ["step_00000001", "step_00000003"]


def test_damaged_newest_is_named_and_replaced_by_the_next_of_its_step(store):
    save_steps(store, 1, 2)
    path = store / "step_00000002" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    step, (line,) = loaded_step(store)
    assert step == 1
    assert "step_00000002 is damaged (__0_0.distcp has changed" in line
    save_steps(store, 2)
    assert loaded_step(store) == (2, [])


def test_store_that_refuses_a_file_ends_the_save_and_leaves_earlier_ones(store, monkeypatch):
    save_steps(store, 1)

    def refused(*arguments) -> None:
        raise RuntimeError("NoCredentialsError: Unable to locate credentials")  # no OSError

    monkeypatch.setattr(checkpoint, "seal", refused)
    with pytest.raises(TrainingError, match=r"step 2: .*memory://.*Unable to locate credentials"):
        save_steps(store, 2)
    assert loaded_step(store) == (1, [])


def test_nothing_in_a_stranger_s_metadata_is_executed(store, tmp_path):
    save_steps(store, 1)

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    metadata = store / "step_00000001" / ".metadata"
    metadata.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint of torch does"):
        checkpoint_reader.DataOnlyReader(store / "step_00000001").read_metadata()
    assert damage(store / "step_00000001") is not None
    assert not (tmp_path / "harmed").exists()


def test_run_that_was_stopped_resumes_from_there_with_the_same_lines(url, tmp_path, shards):
    def lines(folder: Path) -> list[dict]:
        return [without_times(line) for line in read_records(folder / "small" / "metrics.jsonl")]

    (whole := tmp_path / "whole").mkdir()
    assert train_here(small_run(whole, shards)) == 0
    settings = CheckpointSettings(every_steps=5, directory=url)
    config = small_run(tmp_path, shards, checkpoint=settings)
    assert train_here(config, stop_after=12) == 75
    assert names_of(folder_at(url, "")) == ["small"]
    assert not (tmp_path / "small" / "checkpoints").exists()
    assert train_here(config) == 0
    assert is_finished(tmp_path / "small")
    assert lines(tmp_path) == lines(whole)
    newest = str(checkpoint_folders(folder_at(url, "") / "small")[0])
    check_measurement(newest, shards)
    check_export(newest, tmp_path / "small", f"{url}/exported")


def check_measurement(checkpoint: str, shards: Path) -> None:
    request = measure_noise.MeasurementRequest(
        checkpoint=checkpoint,
        data=shards,
        num_sequences=4,
        micro_batch_size=1,
        sequence_length=SEQUENCE_LENGTH,
        interval=False,
        device="cpu",
    )
    report = measure_noise.measure(request)
    assert report is not None
    assert report.num_samples == 4


def check_export(checkpoint: str, run: Path, url: str) -> None:
    unset = ("tokenizer", "max_positions", "license", "push_to_hub", "public")
    options = dict.fromkeys(unset) | {"json": False}
    words = argparse.Namespace(checkpoint=checkpoint, run=run, out=url, **options)
    export_hf.export(words)
    out = folder_at(url, "--out")
    assert {"config.json", "model.safetensors"} <= set(names_of(out))
    weights = safetensors.torch.load((out / "model.safetensors").read_bytes())
    own = load_model(folder_at(checkpoint, "--checkpoint")).embedding.weight
    assert torch.equal(weights["model.embed_tokens.weight"], own)
    with pytest.raises(InputError, match=r"--out memory://.*exported exists already"):
        export_hf.export(words)


def test_run_whose_checkpoints_are_gone_from_the_store_does_not_start_over(url, tmp_path, shards):
    settings = CheckpointSettings(every_steps=5, directory=url)
    config = small_run(tmp_path, shards, checkpoint=settings)
    assert train_here(config, stop_after=6) == 75
    for folder in checkpoint_folders(folder_at(url, "") / "small"):
        (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"memory://.*/small holds no checkpoint, but the run has"):
        train_here(config)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("outputs/elsewhere", r"checkpoint\.directory=outputs/elsewhere is not a URL"),
        ("nope://bucket", r"checkpoint\.directory=nope://bucket cannot be used .*nope"),
    ],
)
def test_place_that_cannot_be_used_is_refused_in_one_line(place, line, tmp_path, shards):
    with pytest.raises(InputError, match=line):
        train_here(small_run(tmp_path, shards, checkpoint=CheckpointSettings(directory=place)))
    assert not (tmp_path / "small").exists()


def test_store_that_does_not_answer_is_named_in_one_line(url, tmp_path, shards, monkeypatch):
    def refused(folder: Path) -> list[Path]:
        raise RuntimeError("Unable to locate credentials")  # its client's own error

    monkeypatch.setattr(checkpoint_reader, "listed_anew", refused)
    settings = CheckpointSettings(directory=url)
    with pytest.raises(InputError, match=r"memory://.*/small cannot be read \(Unable to locate"):
        train_here(small_run(tmp_path, shards, checkpoint=settings))
    assert not (tmp_path / "small").exists()
