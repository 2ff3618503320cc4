"""What is said before a run begins, and a dry run, which leaves nothing behind."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.errors import InputError
from gns_pretrain.launch.train import check_run, launch
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.system.processes import StopRequest
from gns_pretrain.system.terminal import write
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings
from tests.runs import train_here
from tests.settings import odd_model, small_run


def header_of(config, capsys) -> dict[str, str]:
    """The lines of a run's header, by their first word."""
    check_run(config, None, show=write)
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


@pytest.fixture
def dry(tmp_path, shards, monkeypatch):
    """A dry run's settings; temporary files go to tmp_path / "temporary"."""
    monkeypatch.setattr(StopRequest, "listen", lambda stop: None)  # this process is the tests'
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    metrics = MetricsSettings(tensorboard=True, wandb=WandbSettings(enabled=True))
    return small_run(tmp_path / "outputs", shards, dry_run=True, metrics=metrics)


def left_in(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*")]


def test_header_says_what_will_be_trained(tmp_path, shards, capsys):
    lines = header_of(small_run(tmp_path, shards), capsys)
    # By hand: 12 bytes a parameter, and 20 steps of 8 sequences of 16 tokens.
    assert lines["model"] == "odd, 6,822 parameters (4,608 in blocks), float32"
    assert lines["device"] == "CPU, 1 thread; 1 rank on 1 node, single"
    assert lines["data"] == (
        f"{shards}, 3.23k tokens to train on; the budget of 2.56k is 0.792 epochs"
    )
    assert lines["batch"] == "8 sequences x 16 = 128 tokens, constant; 20 steps"
    assert lines["optimizer"] == "adamw, lr 0.01, cosine; noise scale not measured"
    assert lines["memory"].endswith("; a checkpoint takes 81.9 kB")
    assert lines["run"] == f"{tmp_path / 'small'}, random weights"
    assert "note:" not in lines


def test_header_breaks_between_words_on_a_narrow_terminal(tmp_path, shards, capsys, monkeypatch):
    config = small_run(tmp_path, shards)
    check_run(config, None, show=write)
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    check_run(config, None, show=write)
    narrow = capsys.readouterr().out
    assert narrow.split() == whole.split()
    # A path that is longer than a line stays whole, on a line of its own.
    assert [x for x in narrow.splitlines() if len(x) > 60 and len(x.split()) > 1] == []
    assert "\n           " in narrow  # below the text that goes on


def test_header_says_what_is_measured_and_that_an_adaptive_batch_changes_the_steps(
    tmp_path, shards, capsys
):
    config = small_run(
        tmp_path,
        shards,
        noise_scale=NoiseScaleSettings(geometries=["manhattan"], every_steps=7, min_samples=2),
        batch_size=BatchSizeSettings(initial=8, policy="adaptive"),
    )
    lines = header_of(config, capsys)
    assert lines["optimizer"].endswith("noise scale manhattan, every 7 steps")
    assert lines["batch"].endswith("adaptive; 20 steps at the first batch size")


@pytest.mark.parametrize(("size", "noted"), [(121, False), (122, True)])
def test_vocabulary_far_larger_than_the_datas_is_noted(size, noted, tmp_path, shards, capsys):
    lines = header_of(small_run(tmp_path, shards, model=odd_model(vocab_size=size)), capsys)
    assert ("note:" in lines) is noted
    if noted:  # 61 ids of 18 numbers, in the embedding and in the output matrix
        assert lines["note:"].startswith("model.vocab_size=122, but the data has 61 token ids")
        assert "2.20k parameters" in lines["note:"]


def test_dry_run_checks_and_leaves_nothing(dry, tmp_path, capsys):
    assert launch(dry) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "dry run: everything is checked, nothing was written"
    assert printed[0].startswith("model ")
    assert left_in(tmp_path) == [Path("temporary")]
    with pytest.raises(InputError, match=r"batch_size.initial=9"):
        launch(replace(dry, batch_size=BatchSizeSettings(initial=9)))


def test_dry_run_trains_the_steps_asked_for_and_leaves_nothing(dry, tmp_path, capsys):
    assert launch(replace(dry, dry_run_steps=2)) == 0
    printed = capsys.readouterr().out.splitlines()
    steps = [line.split(" | ")[:3] for line in printed if line.startswith("step ")]
    assert [step[0] for step in steps] == ["step 1", "step 2", "step 2"]
    assert "validation loss" in steps[2][2]
    assert any(line.startswith("peak memory of rank 0: ") for line in printed)
    assert left_in(tmp_path) == [Path("temporary")]


def test_dry_run_says_where_a_run_stands_and_changes_none_of_its_files(
    dry, tmp_path, shards, capsys
):
    assert train_here(small_run(tmp_path / "outputs", shards, steps=7)) == 0
    assert "step 7: checkpoint written\n" in capsys.readouterr().out
    saved = tmp_path / "outputs" / "small"
    (saved / "summary.json").unlink()  # as if it had been stopped
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert launch(small_run(tmp_path / "outputs", shards, steps=7, dry_run=True)) == 0
    assert f"{saved}, resumes from step_00000007" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_dry_run_of_a_finished_run_says_so(dry, tmp_path, shards, capsys):
    assert train_here(small_run(tmp_path / "outputs", shards, steps=2)) == 0
    capsys.readouterr()
    assert launch(small_run(tmp_path / "outputs", shards, steps=2, dry_run=True)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "small is finished; resume=never restarts it" in line


def test_optimizer_without_what_is_measured_of_it_is_refused(tmp_path, shards):
    adamax = CustomSettings(class_path="torch.optim.Adamax")
    measured = NoiseScaleSettings(["adam"])
    config = small_run(tmp_path / "outputs", shards, optimizer=adamax, noise_scale=measured)
    with pytest.raises(InputError, match="keep, and this optimizer has none"):
        check_run(config, None, show=write)
    assert not (tmp_path / "outputs").exists()
