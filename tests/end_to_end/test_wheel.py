"""The wheel where no checkout is: the library beside torch and numpy, and the commands."""

import importlib.metadata
import json
import zipfile
from pathlib import Path

import pytest

from gns_pretrain.commands import COMMANDS
from tests.installed import ROOT, add_everything, add_required, build_wheel, make_environment, run

# By its metadata: looking for the module alone makes setuptools leave distutils to it for good.
if not list(importlib.metadata.distributions(name="pip")):
    pytest.skip("pip builds and installs the wheel", allow_module_level=True)

STRANGER = """\
import torch
from gns_pretrain import NoiseMeter, Reading, noise

meter = NoiseMeter(torch.nn.Linear(2, 2), geometries=["manhattan"], every_steps="10")
readings: list[Reading] = meter.read(batch_size=8)
print(readings[0].totals)
"""
MYPY = """\
[mypy]
python_executable = {python}
[mypy-torch.*,numpy.*]
follow_imports = skip
"""
OWN_MODEL = """\
defaults: [schema_llama]
name: mini
dim: 16
num_layers: 1
num_heads: 2
num_kv_heads: 1
ffn_dim: 24
"""
SMALL_RUN = [
    *("--config-dir=mine", "model=mini", "token_budget=512", "data.sequence_length=32"),
    *("micro_batch_size=2", "batch_size.initial=4", "evaluation.num_sequences=4"),
    *("metrics.progress=never", "launch.device=cpu", "launch.threads=1"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, torch, numpy and what these need."""
    environment = tmp_path_factory.mktemp("bare")
    add_required(make_environment(environment, wheel), "torch", "numpy")
    return environment


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and every package."""
    environment = tmp_path_factory.mktemp("full")
    add_everything(make_environment(environment, wheel))
    return environment


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's folder, with a model of their own."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mini.yaml").write_text(OWN_MODEL)
    return tmp_path


def test_wheel_carries_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(path) == (ROOT / "LICENSE").read_bytes()
        metadata = archive.read(path.replace("licenses/LICENSE", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_library_imports_beside_torch_and_numpy_alone(bare, tmp_path):
    code = (
        "import gns_pretrain\n"
        "for name in gns_pretrain.__all__: getattr(gns_pretrain, name)\n"
        "print(gns_pretrain.__file__)"
    )
    answer = run(bare, tmp_path, "python", "-c", code)
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()).is_relative_to(bare)


def test_command_without_its_packages_names_their_extra(bare, tmp_path):
    listed = run(bare, tmp_path, "gns-pretrain", "--help")
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout for name in COMMANDS)
    answer = run(bare, tmp_path, "gns-pretrain", "train")
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: gns-pretrain train needs hydra; pip install 'gns-pretrain[train]'\n"
    )


def test_types_are_those_of_the_installed_package(full, tmp_path):
    (tmp_path / "mypy.ini").write_text(MYPY.format(python=full / "bin" / "python"))
    (tmp_path / "stranger.py").write_text(STRANGER)
    answer = run(full, tmp_path, "python", "-m", "mypy", "--config-file=mypy.ini", "stranger.py")
    mistakes = [line.partition(": error: ") for line in answer.stdout.splitlines()[:-1]]
    assert [where for where, _, _ in mistakes] == [f"stranger.py:{line}" for line in (2, 4, 6)], (
        answer.stdout
    )


def test_two_ranks_train_the_users_own_model_in_the_current_folder(full, folder):
    answer = run(
        full, folder, "gns-pretrain", "train", *SMALL_RUN, "run_name=a", "launch.nproc_per_node=2"
    )
    assert answer.returncode == 0, answer.stderr
    summary = json.loads((folder / "outputs" / "a" / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("finished", 4)
    start = (folder / "outputs" / "a" / "starts.jsonl").read_text().splitlines()[0]
    assert json.loads(start)["ranks"] == 2
    assert json.loads(start)["git_revision"] is None


def test_runs_of_a_sweep_find_the_users_own_model(full, folder):
    words = ["--multirun", *SMALL_RUN, "optimizer.lr=1e-3", "run_name=lr${optimizer.lr}"]
    answer = run(full, folder, "gns-pretrain", "train", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    summary = json.loads((folder / "outputs" / "lr0.001" / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("finished", 4)
