import json
import sys
from types import ModuleType

import pytest

from gns_pretrain.tracking import record as module
from gns_pretrain.tracking.console import ConsoleView
from gns_pretrain.tracking.jsonl import (
    BatchSizeLine,
    NoiseLine,
    ShadowLine,
    TrainLine,
    ValidationLine,
    read_records,
    summarize,
)
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings
from gns_pretrain.tracking.views import WAIT_SECONDS

TRAIN_LINE = (
    '{"kind":"train","step":1,"samples":64,"tokens":131072,"loss":9.5,"lr":0.001,"grad_norm":1.25,'
    '"batch_size":64,"micro_batch_size":8,"accumulation":1,"step_seconds":0.5,'
    '"tokens_per_second":262144.0}'
)
NOISE_LINE = (
    '{"kind":"noise","step":100,"geometry":"manhattan","estimate":"plug_in","noise":8.0,'
    '"signal":2.0,"noise_scale":4.0,"noise_ema":6.0,"signal_ema":2.0,"noise_scale_ema":3.0,'
    '"num_samples":8,"seconds":0.01}'
)


def open_record(directory, *, is_main=True, resume_step=0, settings=None):
    return Record(
        directory,
        settings or MetricsSettings(),
        is_main=is_main,
        resume_step=resume_step,
        config={"model": {"dim": 64}},
        budget=1_000_000,
        run_id="0123abcd",
    )


def train(record, step, *, seconds=0.5, tokens_per_second=262144.0):
    line = TrainLine(
        step=step,
        samples=64 * step,
        tokens=131072 * step,
        loss=9.5,
        lr=0.001,
        grad_norm=1.25,
        batch_size=64,
        micro_batch_size=8,
        accumulation=1,
        step_seconds=seconds,
        tokens_per_second=tokens_per_second,
    )
    record.write(line)


def noise(record, step=100, **changed):
    fields = {
        "geometry": "manhattan",
        "estimate": "plug_in",
        "noise": 8.0,
        "signal": 2.0,
        "noise_scale": 4.0,
        "noise_ema": 6.0,
        "signal_ema": 2.0,
        "noise_scale_ema": 3.0,
        "num_samples": 8,
        "seconds": 0.01,
    }
    record.write(NoiseLine(step=step, **(fields | changed)))


def test_the_five_kinds_of_lines_are_the_documented_ones(tmp_path, capsys):
    record = open_record(tmp_path)
    train(record, 1)
    record.write(ValidationLine(step=100, tokens=13107200, loss=4.873))
    noise(record)
    change = BatchSizeLine(
        step=3700,
        previous=64,
        new=96,
        target=118.9,
        lr_multiplier=1.2247,
        more={"why": "rounded down"},
    )
    record.write(change)
    shadow = ShadowLine(
        step=3700, policy="staged", previous=64, new=128, target=128.0, lr_multiplier=1.4142
    )
    record.write(shadow)
    record.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        TRAIN_LINE,
        '{"kind":"validation","step":100,"tokens":13107200,"loss":4.873}',
        NOISE_LINE,
        '{"kind":"batch_size","step":3700,"from":64,"to":96,"target":118.9,"lr_multiplier":1.2247,'
        '"why":"rounded down"}',
        '{"kind":"shadow","step":3700,"from":64,"to":128,"target":128.0,"lr_multiplier":1.4142,'
        '"policy":"staged"}',
    ]
    assert "target 118.9, rounded down; lr x1.225\n" in capsys.readouterr().out


def test_a_noise_line_takes_further_numbers_at_its_end_and_null_where_undefined(tmp_path):
    record = open_record(tmp_path)
    noise(record, noise_scale=float("inf"), noise_scale_ema=float("nan"), more={"spread": 0.25})
    record.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = NOISE_LINE.replace('"noise_scale":4.0', '"noise_scale":null')
    expected = expected.replace('"noise_scale_ema":3.0', '"noise_scale_ema":null')
    assert line == expected.replace("}", ',"spread":0.25}\n')


def test_a_process_that_is_not_main_writes_and_prints_nothing(tmp_path, capsys):
    directory = tmp_path / "run"
    settings = MetricsSettings(tensorboard=True, wandb=WandbSettings(enabled=True))
    record = open_record(directory, is_main=False, settings=settings)
    train(record, 1)
    record.write(ValidationLine(step=1, tokens=1, loss=1.0))
    noise(record)
    record.write(BatchSizeLine(step=1, previous=1, new=2, target=2.0, lr_multiplier=1.0))
    record.message("hello")
    record.finish({})
    record.close()
    assert not directory.exists()
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_repeats_the_steps_after_its_checkpoint_once(tmp_path):
    record = open_record(tmp_path)
    for step in (1, 2, 3):
        train(record, step)
    record.write(ValidationLine(step=2, tokens=2 * 131072, loss=4.0))
    record.close()
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)

    record = open_record(tmp_path, resume_step=2)
    train(record, 3)
    record.close()
    after = (tmp_path / "metrics.jsonl").read_text()
    assert after == before[0] + before[1] + before[3] + before[2]


def test_a_run_killed_before_its_first_checkpoint_begins_with_an_empty_record(tmp_path):
    record = open_record(tmp_path)
    record.write(ValidationLine(step=0, tokens=0, loss=11.0))
    train(record, 1)
    record.close()
    open_record(tmp_path, resume_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_views_show_a_late_noise_line_where_it_was_read(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ConsoleView, "write", lambda view, record: shown.append(record))
    record = open_record(tmp_path)
    noise(record, step=100, more={"read_at_step": 108})
    record.close()
    (line,) = read_records(tmp_path / "metrics.jsonl")
    assert (line["step"], line["read_at_step"]) == (100, 108)
    assert shown == [{key: v for key, v in line.items() if key != "read_at_step"} | {"step": 108}]


def test_the_summary_spans_the_lines_from_before_a_resume(tmp_path):
    record = open_record(tmp_path)
    train(record, 1, seconds=10.0, tokens_per_second=1.0)  # compilation
    record.write(ValidationLine(step=1, tokens=131072, loss=3.5))
    record.close()
    record = open_record(tmp_path, resume_step=1)
    train(record, 2, seconds=1.0, tokens_per_second=100.0)
    train(record, 3, seconds=1.0, tokens_per_second=120.0)
    record.write(ValidationLine(step=3, tokens=393216, loss=4.0))
    record.finish({"parameters": 1000})
    record.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "state": "finished",
        "steps": 3,
        "samples": 192,
        "tokens": 393216,
        "validation_loss": 4.0,
        "minimum_validation_loss": 3.5,
        "minimum_validation_loss_step": 1,
        "minimum_validation_loss_tokens": 131072,
        "tokens_per_second": 100.0,
        "seconds": 12.0,
        "batch_size": 64,
        "parameters": 1000,
    }


def test_a_run_without_steps_or_validation_has_a_summary():
    summary = summarize([])
    assert (summary["steps"], summary["tokens"], summary["seconds"]) == (0, 0, 0)
    assert summary["validation_loss"] is None
    assert summary["tokens_per_second"] is None


def test_no_summary_stands_before_the_run_is_finished(tmp_path):
    record = open_record(tmp_path)
    train(record, 1)
    record.close()
    assert not (tmp_path / "summary.json").exists()


class LibraryError(Exception):
    """What a tracking library may throw, over several lines."""


class FailingWandb(ModuleType):
    """A wandb whose calls fail from a chosen one on, and which notes the calls."""

    def __init__(self, failing):
        super().__init__("wandb")
        self.failing = failing
        self.calls = []
        self.summary = {}
        self.offline = False
        self.Settings = dict

    def call(self, name):
        self.calls.append(name)
        if name in self.failing:
            raise LibraryError(f"no {name}\nsecond line")

    def setup(self, settings):
        self.call("setup")

    def init(self, **arguments):
        self.call("init")
        return self

    def define_metric(self, *names, **arguments):
        self.call("define_metric")

    def log(self, row):
        self.call("log")

    def finish(self, exit_code):
        self.call("finish")


@pytest.mark.parametrize("failing", ["setup", "init", "define_metric", "log", "finish"])
def test_a_wandb_that_fails_is_logged_once_and_training_continues(
    tmp_path, monkeypatch, capsys, failing
):
    library = FailingWandb({failing})
    monkeypatch.setitem(sys.modules, "wandb", library)
    filled = []
    monkeypatch.setattr(module, "upload_in_process", lambda *given: filled.append(given))
    record = open_record(
        tmp_path, settings=MetricsSettings(log_every=1, wandb=WandbSettings(enabled=True))
    )
    for step in (1, 2, 3):
        train(record, step)
    record.finish({})
    record.close()

    logged = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert logged == [
        "W&B failed and is left out from here on, metrics.jsonl has everything "
        f"(LibraryError: no {failing} second line)",
        "W&B has been filled in from metrics.jsonl",
    ]
    assert filled == [(tmp_path, WAIT_SECONDS)]
    assert library.calls.count(failing) == 1
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "summary.json").exists()


def test_a_view_that_cannot_be_filled_in_says_what_may_be_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", FailingWandb({"init"}))
    record = open_record(tmp_path, settings=MetricsSettings(wandb=WandbSettings(enabled=True)))
    record.finish({})  # which finds no run here, but its record
    record.close()
    *_, line = (line for line in capsys.readouterr().out.splitlines() if "W&B" in line)
    assert line == (
        f"W&B has not been filled in: {tmp_path} holds no run; name a run, or a folder of some; "
        f"gns-pretrain upload-wandb {tmp_path} tries again"
    )


def test_a_missing_library_is_logged_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ModuleNotFoundError
    record = open_record(tmp_path, settings=MetricsSettings(wandb=WandbSettings(enabled=True)))
    train(record, 1)
    record.close()
    assert "pip install 'gns-pretrain[tracking]'" in capsys.readouterr().out
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1
