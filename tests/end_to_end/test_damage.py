"""Whatever has happened to a file, each command that reads it ends in one line and its own code.

A run that cannot be read hides no other one: the status, tables, figures and searches show the
others and name it.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gns_pretrain.commands import plot_runs
from gns_pretrain.data.prepare import prepare as preparing
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.results.figures import PANELS, over_seeds
from gns_pretrain.runs import history, lock
from tests.end_to_end.damages import apply, harms
from tests.end_to_end.in_process import Ended, command, ended
from tests.end_to_end.test_malicious import seal
from tests.runs import train_here
from tests.settings import odd_model, small_run
from tests.unit.data_samples import make_texts, write_gzip, write_tokenizer
from tests.unit.run_records import write_curve, write_run

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look at a lock's heartbeat for a moment alone, and draw no picture: that takes a second."""
    monkeypatch.setattr("sys.argv", sys.argv)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.02)

    def draw(groups, *_, **__):
        for panel, curves in itertools.product(PANELS.values(), groups.values()):
            if found := [run[panel.quantity] for run in curves if panel.quantity in run]:
                over_seeds(found, transform=panel.transform, stepwise=panel.stepwise)
        return ["perplexity"]

    monkeypatch.setattr(plot_runs, "draw", draw)


class Place:
    """Shards, and two runs that were trained on them, a finished one and one that was stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.outputs = folder / "data", folder / "outputs"
        write_gzip(folder / "train.json.gz", make_texts(120))
        write_tokenizer(folder / "tokenizer.json")
        preparing.prepare(self.prepare_settings(self.data), show_progress=False)
        assert train_here(self.config("good", seed=0)) == 0
        assert train_here(self.config("stopped", seed=2), stop_after=7) == 75
        (self.outputs / "stopped").rename(folder / "stopped")
        (newest,) = (self.outputs / "good" / "checkpoints").glob("*10")
        self.checkpoint = newest

    def prepare_settings(self, out: Path) -> PrepareSettings:
        return PrepareSettings(
            out=str(out),
            train=[str(self.folder / "train.json.gz")],
            validation_fraction=0.2,
            tokenizer=str(self.folder / "tokenizer.json"),
            workers=1,
            shard_tokens=1500,
        )

    def config(self, name: str, **changes):
        return small_run(
            self.outputs,
            self.data,
            run_name=name,
            steps=10,
            model=odd_model(vocab_size=300),
            noise_scale=NoiseScaleSettings(geometries=["manhattan"], every_steps=5),
            **changes,
        )

    def resume(self) -> Ended:
        """Continue the stopped run by a step."""
        config = self.config("stopped", seed=2)
        config.output_directory = str(self.folder)
        return ended(lambda: train_here(config, stop_after=1))

    def export(self, checkpoint: Path) -> Ended:
        out = self.folder / "exported"
        shutil.rmtree(out, ignore_errors=True)
        return command("export-hf", "--checkpoint", checkpoint, "--out", out)

    def measure(self, checkpoint: Path, data: Path | None = None) -> Ended:
        words = ("--num-sequences", 4, "--micro-batch-size", 2, "--sequence-length", 16)
        named = ("--checkpoint", checkpoint, "--data", data or self.data)
        return command("measure-noise", *named, *words, "--no-interval")

    def prepare(self, out: Path, **paths: Path) -> Ended:
        train = paths.get("train", self.folder / "train.json.gz")
        words = ("--train", train, "--validation-fraction", 0.2, "--workers", 1)
        named = ("--out", out, "--tokenizer", self.folder / "tokenizer.json")
        return command("prepare-data", *named, *words, "--shard-tokens", 1500)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def copied(source: str, target: str) -> None:
    """Copy a file, or a pipe."""
    os.mkfifo(target) if Path(source).is_fifo() else shutil.copy2(source, target)


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Put a folder back as it was."""
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = Path(elsewhere) / "copy"
        shutil.copytree(folder, copy, symlinks=True, copy_function=copied)
        try:
            yield
        finally:
            shutil.rmtree(folder)
            shutil.copytree(copy, folder, symlinks=True, copy_function=copied)


def problems_of(
    path: Path, tried: Callable[[], Iterator[tuple[str, str]]], *, first: int = 0, every: int = 1
) -> list[str]:
    """Do all harm to a file, and collect what is wrong with how commands end.

    Args:
        path: of the file.
        tried: runs commands; returns their names and problems.
        first: of the harms that are done.
        every: so many.
    """
    problems = []
    for name, harm in [*harms(path)][first::every]:
        with kept(path.parent):
            apply(path, harm)
            problems += [f"{name}: {which}: {why}" for which, why in tried() if why]
    return problems


def write_whole_run(outputs: Path, name: str, table: str, **settings) -> None:
    """A finished run, made by hand, with each file and each kind of line that a run has."""
    cell = "signum" if table == "tune" else "signum_small"
    run = write_run(outputs, table, cell, [(1, 6.0), (2, 5.0)], name=name, **settings)
    counts = {"samples": 16, "tokens": 160, "batch_size": 16, "micro_batch_size": 4}
    step = counts | {"accumulation": 4, "loss": 6.1, "lr": 0.001, "grad_norm": 1.0}
    step |= {"step_seconds": 0.1, "tokens_per_second": 1600.0}
    averages = dict.fromkeys(("noise", "signal", "noise_ema", "signal_ema"), 2.0)
    noise = {"geometry": "manhattan", "estimate": "plug_in", "noise_scale_ema": 1.0} | averages
    change = {"from": 16, "to": 32, "target": 30.5, "lr_multiplier": 1.4}
    lines = [
        {"kind": "train", "step": 1, **step},
        {"kind": "noise", "step": 1, **noise},
        {"kind": "batch_size", "step": 2, **change},
        {"kind": "train", "step": 2, **step, "tokens": 480, "batch_size": 32},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    summary = {"state": "finished", "steps": 2, "tokens": 480, "minimum_validation_loss": 5.0}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.json").write_text(json.dumps({"data_fingerprint": "0" * 64, "run_id": "f00"}))
    history.append_event(run, "start", slurm={"job": "12", "starts": 0}, process=5)
    history.append_end(run, "failed", "KeyError: 'x'")
    (run / ".lock").write_text("process 5 on n1\n")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Records made by hand: runs of a table and of a search, a good one and one to damage each."""
    folder = tmp_path_factory.mktemp("records")
    for seed, name in enumerate(("good", "bad")):
        write_whole_run(folder / "outputs", name, "table2", seed=seed)
        write_whole_run(folder / "search", name, "tune", optimizer__lr=0.01 * (1 + seed))
    return folder


RECORD = ["config.yaml", "run.json", "starts.jsonl", "metrics.jsonl", "summary.json", ".lock"]


@pytest.mark.parametrize(("number", "name"), [*enumerate(RECORD)])
def test_damaged_run_hides_no_other(number, name, records):
    outputs, out = records / "outputs", ("--out", records / "p.png")
    good, bad = outputs / "good", outputs / "bad"

    def tried():
        yield "status", command("status", outputs).problem_beside("good")
        yield "table", command("make-table", "table2", outputs).problem_beside("Signum")
        yield "plot", command("plot-runs", good, bad, *out).problem_beside("good")
        yield "replay", command("replay", bad / "metrics.jsonl", "--json").problem
        yield "one plot", command("plot-runs", bad, *out).problem

    assert problems_of(bad / name, tried, first=number % 4, every=4) == []


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "summary.json"])
def test_damaged_run_hides_no_other_of_a_search(name, records):
    def tried():
        yield "search", command("best-of-search", records / "search").problem_beside("point")

    assert problems_of(records / "search" / "bad" / name, tried, every=4) == []


RESUMED = {"config.yaml": 40, "run.json": 8, "starts.jsonl": 8, "metrics.jsonl": 12, ".lock": 6}


@pytest.mark.parametrize(("name", "every"), [*RESUMED.items()])
def test_resume_of_a_damaged_run_ends_in_one_line(name, every, place):
    def tried():
        yield "resume", place.resume().problem

    assert problems_of(place.folder / "stopped" / name, tried, first=1, every=every) == []


CHECKPOINT = [
    "manifest.json", "train_state.json", "model.json", "generators.pt", ".metadata", "__0_0.distcp",
]  # fmt: skip


@pytest.mark.parametrize(("number", "name"), [*enumerate(CHECKPOINT)])
def test_before_a_damaged_checkpoint_an_older_one_is_used(number, name, place):
    path = place.folder / "stopped" / "checkpoints" / "step_00000007" / name

    def tried():
        with kept(place.folder / "stopped"):
            result = place.resume()
        yield "resume", result.problem or "step 5" * ("resumed from step 5" not in result.out)

    assert problems_of(path, tried, first=number, every=12) == []


@pytest.mark.parametrize(("number", "name"), [*enumerate(CHECKPOINT[1:])])
def test_checkpoint_of_a_stranger_ends_in_one_line(number, name, place):
    """Its manifest says that it is whole."""
    path = place.checkpoint / name

    def tried():
        yield "damaged", place.measure(place.checkpoint).problem
        if path.is_file():  # else it has no sum
            seal(place.checkpoint)
            yield "measure", place.measure(place.checkpoint).problem
            yield "export", place.export(place.checkpoint).problem
            with kept(place.folder / "stopped"):
                newest = place.folder / "stopped" / "checkpoints" / "step_00000007"
                shutil.copy(path, newest / name)
                seal(newest)
                yield "resume", place.resume().problem

    assert problems_of(path, tried, first=number, every=12) == []


@pytest.mark.parametrize(
    ("number", "name"), [*enumerate(["meta.json", "tokenizer.json", "train_00000.npy"])]
)
def test_damaged_shards_end_in_one_line(number, name, place):
    def tried():
        with kept(place.folder / "stopped"):
            yield "resume", place.resume().problem
        yield "measure", place.measure(place.checkpoint).problem
        yield "export", place.export(place.checkpoint).problem
        yield "prepare", place.prepare(place.data).problem

    assert problems_of(place.data / name, tried, first=number, every=9) == []


@pytest.fixture(scope="module")
def half_prepared(place) -> Path:
    """A folder whose preparation was killed at its fourth shard."""
    folder, write_shard, written = place.folder / "half", preparing.write_shard, itertools.count()

    def killed(*arguments, **options):
        if next(written) == 3:
            raise KeyboardInterrupt
        return write_shard(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            preparing.prepare(place.prepare_settings(folder), show_progress=False)
    return folder


@pytest.mark.parametrize(
    ("name", "every"), [("progress.json", 2), ("tokenizer.json", 4), ("train_00000.npy", 4)]
)
def test_half_prepared_folder_that_is_damaged_ends_in_one_line(name, every, place, half_prepared):
    def tried():
        yield "prepare", place.prepare(half_prepared).problem

    assert problems_of(half_prepared / name, tried, every=every) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "train.json.gz"])
def test_damaged_input_of_a_preparation_ends_in_one_line(name, place, tmp_path):
    inputs = Path(shutil.copytree(place.folder, tmp_path / "inputs", ignore=only_files))

    def tried():
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        words = ("--train", inputs / "train.json.gz", "--tokenizer", inputs / "tokenizer.json")
        yield (
            "prepare",
            command(
                "prepare-data", "--out", out, *words, "--validation-fraction", 0.2, "--workers", 1
            ).problem,
        )

    assert problems_of(inputs / name, tried, every=2) == []


def only_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_dir()]


@pytest.mark.parametrize(
    ("number", "name"),
    [*enumerate(["config.json", "model.safetensors", "model.safetensors.index.json"])],
)
def test_damaged_folder_of_hugging_face_ends_in_one_line(number, name, place):
    pytest.importorskip("safetensors")
    exported = place.folder / "exported"
    assert place.export(place.checkpoint).code == 0
    weights = {"model.norm.weight": "model.safetensors"}
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    def tried():
        yield "measure", place.measure(exported).problem

    assert problems_of(exported / name, tried, first=number, every=3) == []


def test_damaged_curve_ends_in_one_line(place):
    rows = [(step, 5 - step / 100) for step in range(0, 100, 10)]
    columns = {"tokens": range(0, 1000, 100), "batch_size": [16] * 10, "noise": [20.0] * 10}
    curve = write_curve(place.folder / "curves" / "seed_0.csv", rows, **columns)
    write_curve(place.folder / "curves" / "good_seed_1.csv", rows, **columns)

    def tried():
        out = ("--out", place.folder / "p.png")
        yield "replay", command("replay", curve).problem
        yield "plot", command("plot-runs", curve, *out).problem
        yield "folder", command("plot-runs", curve.parent, *out).problem
        yield "table", command("make-table", "table2", f"signum_small={curve}").problem

    assert problems_of(curve, tried) == []
