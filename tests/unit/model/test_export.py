"""scripts/export_hf.py: which tokenizer comes along, and where nothing can be written."""

import json
import runpy
import shutil
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from gns_pretrain.config.compose import as_yaml
from gns_pretrain.data.settings import open_splits
from gns_pretrain.data.shards import joint_fingerprint
from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.mesh import World
from gns_pretrain.runs.history import write_provenance
from gns_pretrain.training.checkpoint import Checkpoints
from tests.settings import VOCABULARY, odd_model, small_run

SCRIPT = Path(__file__).parents[3] / "scripts" / "export_hf.py"
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


def give_tokenizer(folder: Path, word: str) -> Path:
    """Put a tokenizer of that word beside the shards, and into their meta.json."""
    path = folder / "tokenizer.json"
    vocabulary = {f"{word}{i}": i for i in range(VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, f"{word}0")).save(str(path))
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"tokenizer": path.name, "tokenizer_sha256": sha256(path.read_bytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def data(tmp_path, shards) -> Path:
    folder = shutil.copytree(shards, tmp_path / "data")
    give_tokenizer(folder, "own")
    return folder


@pytest.fixture
def saved(tmp_path, data, monkeypatch) -> Path:
    """A checkpoint in the folder of a run that was started beside its data, data.path=data."""
    monkeypatch.chdir(tmp_path)
    config = small_run(tmp_path, Path("data"))
    fingerprint = joint_fingerprint(split.fingerprint for split in open_splits(config.data))
    origin = asdict(config.data.origin())
    write_provenance(tmp_path / "run", as_yaml(config), fingerprint, origin)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = Llama(odd_model())
    model.init_weights(0)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, world=ALONE)
    state = {"step": 1, "tokens": 128}
    return checkpoints.save(model, config.optimizer.build(model), state)


def export(saved: Path, out: Path, monkeypatch, *more: str) -> int:
    words = ["export_hf.py", "--checkpoint", str(saved), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def replace_data(data: Path) -> None:
    """Prepare the folder anew: other tokens, and another tokenizer of the same size."""
    meta = json.loads((data / "meta.json").read_text())
    meta["shards"] = meta["shards"][1:]
    (data / "meta.json").write_text(json.dumps(meta))
    give_tokenizer(data, "other")


def test_tokenizer_of_the_runs_data_comes_along(saved, data, tmp_path, monkeypatch):
    assert export(saved, tmp_path / "out", monkeypatch) == 0
    assert "own7" in (tmp_path / "out" / "tokenizer.json").read_text()
    assert eos_of(tmp_path / "out") == (0, "own0")


def eos_of(out: Path) -> tuple[int | None, str | None]:
    config = json.loads((out / "config.json").read_text())
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    return config["eos_token_id"], tokenizer.get("eos_token")


def test_ids_are_known_where_the_data_is_not(saved, data, tmp_path, monkeypatch, capsys):
    kept = shutil.copy(data / "tokenizer.json", tmp_path / "kept.json")
    shutil.rmtree(data)
    assert export(saved, tmp_path / "out", monkeypatch) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
    assert "without a tokenizer: name one with --tokenizer" in capsys.readouterr().out
    assert export(saved, tmp_path / "with", monkeypatch, "--tokenizer", str(kept)) == 0
    assert eos_of(tmp_path / "with") == (0, "own0")


def test_run_that_has_not_noted_its_data_is_exported_as_before(
    saved, data, tmp_path, monkeypatch, capsys
):
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    del provenance["data"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(provenance))
    kept = str(data / "tokenizer.json")
    assert export(saved, tmp_path / "out", monkeypatch, "--tokenizer", kept) == 0
    assert "no bos and no eos: the run's data has none, or was not found" in capsys.readouterr().out
    assert eos_of(tmp_path / "out") == (None, None)
    monkeypatch.chdir(tmp_path)  # where data.path=data is right
    assert export(saved, tmp_path / "here", monkeypatch) == 0
    assert eos_of(tmp_path / "here") == (0, "own0")


def test_data_that_has_moved_is_noted_by_the_next_start(tmp_path, data):
    write_provenance(tmp_path / "run", "seed: 0", "print", {"folder": "old", "eos_id": 1})
    write_provenance(tmp_path / "run", "seed: 0", "print", {"folder": "new", "eos_id": 1})
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["data"] == {"folder": "new", "eos_id": 1}
    assert provenance["run_id"]


def test_data_noted_wrongly_is_one_line(saved, tmp_path, monkeypatch, capsys):
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(provenance | {"data": {"folder": 1}}))
    assert export(saved, tmp_path / "out", monkeypatch) == 2
    assert "run.json holds an entry of the wrong type, 1 for str" in capsys.readouterr().err


def test_tokenizer_of_other_data_at_the_same_path_is_refused(
    saved, data, tmp_path, monkeypatch, capsys
):
    kept = shutil.copy(data / "tokenizer.json", tmp_path / "kept.json")
    replace_data(data)
    assert export(saved, tmp_path / "out", monkeypatch) == 2
    assert "no longer holds the data of this run; name its tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(saved, tmp_path / "out", monkeypatch, "--tokenizer", str(kept)) == 0
    assert "own7" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_tokenizer_that_was_exchanged_alone_is_refused(saved, data, tmp_path, monkeypatch, capsys):
    (data / "tokenizer.json").write_text("{}")
    assert export(saved, tmp_path / "out", monkeypatch) == 2
    assert "does not match tokenizer_sha256" in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_named(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert export(saved, tmp_path / "file" / "out", monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out: {tmp_path}/file cannot be written (")
    assert error.count("\n") == 1
