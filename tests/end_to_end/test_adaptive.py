"""The adaptive batch size through the real command: grown, killed, moved to other ranks."""

import math
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.batch_size.controller import Controller
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.results.replay import main as replay
from gns_pretrain.tracking.jsonl import BatchSizeLine, read_records
from gns_pretrain.tracking.record import Record
from gns_pretrain.training import loop, step_log
from gns_pretrain.training.schedule import Schedule
from tests.end_to_end import commands
from tests.runs import train_here
from tests.settings import SEQUENCE_LENGTH, small_run, without_times

MEASURED = (
    "noise_scale=manhattan",
    "noise_scale.every_steps=2",
    "micro_batch_size=1",
    "batch_size.micro_batch_max=2",
    "metrics.log_every=4",
)
# Without smoothing to speak of and with a small theta the batch of this tiny model grows at once.
ADAPTIVE = (
    *MEASURED,
    "batch_size=adaptive",
    "batch_size.theta=0.5",
    "batch_size.decide_every_steps=3",
    "batch_size.cap=32",
)
BUDGET = 20 * 8 * SEQUENCE_LENGTH


def lines(folder: Path) -> list[dict]:
    return [without_times(record) for record in read_records(folder / "small" / "metrics.jsonl")]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards) -> Path:
    """The folder of an adaptive run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("adaptive")
    assert commands.run(commands.arguments(folder, shards, *ADAPTIVE), folder / "log") == 0
    return folder


def test_batch_grows_by_lines_that_say_from_what_to_what_and_why(whole):
    changes = of_kind(lines(whole), "batch_size")
    assert len(changes) >= 2
    log = (whole / "log").read_text().splitlines()
    told = [line for line in log if line.startswith("batch size ")]
    assert len(told) == len(changes)
    for change, text in zip(changes, told, strict=True):
        assert text.startswith(
            f"batch size {change['from']} -> {change['to']} at step {change['step']}: "
            f"target {change['target']:.1f}, {change['why']}; "
        )
        assert change["step"] % 3 == 0
        assert change["lr_multiplier"] == (change["to"] / 8) ** 0.5


def test_every_step_has_the_size_that_was_decided_and_its_samples(whole):
    records = lines(whole)
    sizes = {change["step"]: change["to"] for change in of_kind(records, "batch_size")}
    size, samples = 8, 0
    for step in of_kind(records, "train"):
        size = sizes.get(step["step"], size)
        samples += size
        assert step["batch_size"] == size == step["micro_batch_size"] * step["accumulation"]
        assert step["accumulation"] >= 8
        assert (step["samples"], step["tokens"]) == (samples, samples * SEQUENCE_LENGTH)


def test_lines_stand_in_the_order_of_their_steps(whole):
    steps = [record["step"] for record in lines(whole)]
    assert steps == sorted(steps)


def test_budget_and_evaluation_are_counted_in_tokens(whole):
    records = lines(whole)
    *_, before_last, last = (step["tokens"] for step in of_kind(records, "train"))
    assert before_last < BUDGET <= last
    evaluated = {record["tokens"] for record in of_kind(records, "validation")}
    tokens = [0, *(step["tokens"] for step in of_kind(records, "train"))]
    half = BUDGET // 2
    crossing = {after for before, after in pairwise(tokens) if before // half != after // half}
    assert evaluated == crossing | {tokens[1], last}


def test_metrics_replay_to_the_same_batch_sizes_and_learning_rates(whole, capsys):
    assert replay([str(whole / "small" / "metrics.jsonl")]) == 0
    assert replay([str(whole / "small" / "metrics.jsonl"), "--theta=0.7"]) == 1
    assert "first difference at step " in capsys.readouterr().out


def die(*arguments, **keywords) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_the_second_change_of_the_batch() -> None:
    decide, taken = Controller.decide, []

    def decide_once(self, position, batch_size, noise):
        decision = decide(self, position, batch_size, noise)
        if decision is not None:
            taken.append(decision)
            if len(taken) == 2:
                die()
        return decision

    Controller.decide = decide_once


def die_when_the_change_has_been_told() -> None:
    write = Record.write

    def write_and_die(self, line, **shown):
        write(self, line, **shown)
        if isinstance(line, BatchSizeLine):
            die()

    Record.write = write_and_die


def die_in_the_first_step_of_the_new_size() -> None:
    take = loop.one_step

    def take_unless_grown(run, log):
        if run.adaptive.batch_size > 8:
            die()
        return take(run, log)

    loop.one_step = take_unless_grown


@pytest.mark.parametrize(
    ("sabotage", "save_every"),
    [
        # Saved every step, the last checkpoint holds the measurement and not yet the change.
        (die_before_the_second_change_of_the_batch, 1),
        (die_when_the_change_has_been_told, 1),
        (die_when_the_change_has_been_told, 4),
        (die_in_the_first_step_of_the_new_size, 5),
    ],
)
def test_killed_around_a_change_it_ends_with_the_same_lines(
    sabotage, save_every, whole, tmp_path, shards
):
    # Written before training goes on: the kill comes after the save.
    saving = (f"checkpoint.every_steps={save_every}", "checkpoint.asynchronous=false")
    words = commands.arguments(tmp_path, shards, *ADAPTIVE, *saving)
    assert commands.run(words, tmp_path / "log", sabotage) == -signal.SIGKILL
    assert commands.run(words, tmp_path / "log") == 0
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert lines(tmp_path) == lines(whole)


def test_shadows_say_what_they_would_choose_and_change_nothing(whole, tmp_path, shards):
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    shadows = "{theta: 0.5, decide_every_steps: 3}, {policy: norm_test, theta: 0.3, name: norm}"
    for folder, more in (
        (alone, ()),
        (
            watched,
            (f"batch_size.shadows=[{shadows}]", "noise_scale.geometries=[manhattan,euclidean]"),
        ),
    ):
        folder.mkdir()
        words = commands.arguments(folder, shards, *MEASURED, *more)
        assert commands.run(words, folder / "log") == 0, (folder / "log").read_text()
    assert of_kind(lines(watched), "train") == of_kind(lines(alone), "train")
    told = of_kind(lines(watched), "shadow")
    assert {line["policy"] for line in told} == {"adaptive_manhattan_plug_in_theta_0.5", "norm"}
    for name in {line["policy"] for line in told}:
        path = [line for line in told if line["policy"] == name]
        assert path[0]["from"] == 8
        assert all(before["to"] == after["from"] < after["to"] for before, after in pairwise(path))
    # Until its first change the run that followed the same policy was the same run.
    chosen = next(line for line in told if line["policy"].startswith("adaptive"))
    followed = of_kind(lines(whole), "batch_size")[0]
    assert chosen == followed | {"kind": "shadow", "policy": chosen["policy"]}


def test_mistake_is_refused_in_one_line_before_anything_is_written(tmp_path, shards):
    folder = tmp_path / "outputs"
    words = commands.arguments(folder, shards, *ADAPTIVE, "micro_batch_size=2")
    assert commands.run(words, tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    assert log.startswith("error: batch_size.initial=8 is not feasible on 1 rank")
    assert "noise_scale.min_samples=8" in log
    assert log.endswith("or micro_batch_size=1\n")
    assert log.count("\n") == 1
    assert not folder.exists()


def test_seesaw_grows_as_the_schedule_falls_and_resumes_on_its_path(tmp_path, shards):
    seesaw = BatchSizeSettings(policy="seesaw", initial=8, cap=64)
    for name, stop_after in (("whole", None), ("resumed", 17), ("resumed", None)):
        config = small_run(tmp_path, shards, steps=40, run_name=name, batch_size=seesaw)
        assert train_here(config, stop_after=stop_after) == (75 if stop_after else 0)
    whole, resumed = (
        [
            without_times(record)
            for record in read_records(tmp_path / name / "metrics.jsonl")
            if record["kind"] in ("train", "batch_size")
        ]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
    # Sizes are whole micro-batches of 2; the cosine of 40 steps of 8 after 6 of warm-up.
    schedule = Schedule(config.schedule, initial_batch_size=8, total_steps=40)
    steps, samples, size = of_kind(whole, "train"), 0, 8
    for step in steps:
        decay = schedule.decay(samples)
        wanted = min(8 / decay if decay else math.inf, 64, 320 - samples)
        size = max(size, 2 * math.floor(wanted / 2))
        assert step["batch_size"] == size
        rate = schedule.factor(samples) * (size / 8) ** 0.5
        assert step["lr"] == pytest.approx(1e-2 * rate, rel=1e-12)
        samples += size
    assert len(steps) < 40
    assert size > 32


class Clock:
    """A step of B sequences takes 4 + B / 4 seconds, and nothing else any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, take = 0.0, loop.one_step

        def step(run, log):
            self.now += 4.0 + run.adaptive.batch_size / 4
            return take(run, log)

        monkeypatch.setattr(loop, "one_step", step)
        monkeypatch.setattr(step_log, "time", self)

    def perf_counter(self) -> float:
        return self.now


def test_goodput_weighs_the_seconds_of_its_own_steps_resumes_and_is_replayed(
    monkeypatch, tmp_path, shards
):
    settings = {"initial": 8, "micro_batch_max": 64, "warmup_fraction": 0.0}
    goodput = BatchSizeSettings(policy="goodput", decide_every_steps=8, **settings)
    measured = NoiseScaleSettings(geometries=["manhattan"], every_steps=4, min_samples=4)
    Clock(monkeypatch)
    for name, stops in (("whole", (None,)), ("resumed", (19, None))):
        for stop_after in stops:
            config = small_run(
                tmp_path, shards, steps=60, run_name=name, batch_size=goodput, noise_scale=measured
            )
            assert train_here(config, stop_after=stop_after) == (75 if stop_after else 0)
    whole, resumed = (
        read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed")
    )
    for kind in ("train", "batch_size"):
        assert of_kind(resumed, kind) == [
            line | {"tokens_per_second": pytest.approx(line["tokens_per_second"])}
            if kind == "train"
            else line
            for line in of_kind(whole, kind)
        ]
    first, second, *_ = of_kind(whole, "batch_size")
    assert (first["step"], first["from"], first["to"]) == (16, 8, 16)
    assert "50% fixed by assumption: only 8 was timed yet" in first["why"]
    assert "a step takes 4 s and 0.25 s a sample, by 2 batch sizes" in second["why"]
    assert replay([str(tmp_path / "resumed")]) == 0
