import io
from pathlib import Path

import pytest
from rich.console import Console

from gns_pretrain.tracking.console import ConsoleView, closing_table, duration, short_number
from gns_pretrain.tracking.jsonl import summarize
from gns_pretrain.tracking.settings import MetricsSettings

TRAIN = {
    "kind": "train",
    "step": 3700,
    "tokens": 485_000_000,
    "loss": 4.8731,
    "lr": 0.0037,
    "batch_size": 96,
    "tokens_per_second": 586_321.0,
}
NOISE = {
    "kind": "noise",
    "step": 3700,
    "geometry": "manhattan",
    "estimate": "plug_in",
    "noise_scale_ema": 42.94,
}
LINE = (
    "step 3,700 | tokens 485M/3.20B (15.2%) | loss 4.873 | lr 3.7e-03 | batch 96 | "
    "noise scale 42.9 | 586k tok/s | 1 h 17 min left"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_view(file, *, width=200, color_system="auto", **settings):
    return ConsoleView(
        MetricsSettings(**settings),
        budget=3_200_000_000,
        run_directory=Path("outputs/demo"),
        console=Console(file=file, width=width, color_system=color_system),
    )


def printed(*records, **settings):
    """What a view prints into a file, line by line."""
    file = io.StringIO()
    view = open_view(file, **settings)
    for record in records:
        view.write(record)
    view.close()
    return file.getvalue().splitlines()


def test_a_training_line_has_the_documented_form_whatever_the_width():
    assert printed(NOISE, TRAIN, width=40) == [LINE]


def test_before_a_measurement_no_noise_scale_is_shown():
    assert printed(TRAIN) == [LINE.replace("noise scale 42.9 | ", "")]


def test_several_noise_scales_are_named_and_an_undefined_one_says_so():
    nuclear = NOISE | {"geometry": "nuclear", "noise_scale_ema": None}
    (line,) = printed(NOISE, nuclear, TRAIN)
    assert "| noise scale manhattan plug_in 42.9, nuclear plug_in undefined |" in line


def test_lines_come_at_the_first_step_and_every_log_every():
    records = [TRAIN | {"step": step} for step in range(4, 13)]
    lines = printed(*records, log_every=5)
    assert [line.split(" | ")[0] for line in lines] == ["step 4", "step 5", "step 10"]


def test_a_validation_is_always_shown():
    record = {"kind": "validation", "step": 3, "tokens": 485_000_000, "loss": 4.87312}
    assert printed(record, log_every=1000) == [
        "step 3 | tokens 485M/3.20B (15.2%) | validation loss 4.8731"
    ]


def test_a_batch_size_change_says_what_it_was_decided_on():
    record = {
        "kind": "batch_size",
        "step": 3700,
        "from": 64,
        "to": 96,
        "target": 118.9,
        "lr_multiplier": 1.2247,
        "why": "rounded down to a multiple of 32 (8 ranks x 4 sequences)",
    }
    assert printed(record) == [
        "batch size 64 -> 96 at step 3,700: target 118.9, rounded down to a multiple of 32 "
        "(8 ranks x 4 sequences); lr x1.225"
    ]
    assert printed(record | {"target": None, "why": ""}) == [
        "batch size 64 -> 96 at step 3,700; lr x1.225"
    ]


def test_a_message_is_printed_as_it_is(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # build servers set it; a file is still no terminal
    file = io.StringIO()
    view = open_view(file, width=40)
    text = "data.path=[red]/x[/red] :smile: " + "long " * 20 + "end"
    view.message(text)
    view.write(TRAIN)
    view.close()
    assert file.getvalue().splitlines()[0] == text
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("progress", ["auto", "always"])
def test_a_terminal_of_80_columns_shows_the_whole_bar(monkeypatch, progress):
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    view = ConsoleView(
        MetricsSettings(progress=progress),
        budget=3_200_000_000,
        run_directory=Path("outputs/demo"),
        console=Console(file=file, width=80, color_system=None),
    )
    view.write(TRAIN | {"tokens": 1_600_000_000})
    view.message("a line of [its] own")
    view.close()
    screen = file.getvalue()
    text = "step 3,700  loss 4.873  lr 3.7e-03  batch 96  586k tok/s  0:45:29 "
    assert text in screen
    assert "━" in screen
    assert "a line of [its] own\n" in screen
    assert "step 3,700 |" not in screen
    assert screen.endswith("\x1b[?25h")  # the cursor is shown again


ON_GPU = TRAIN | {"tokens": 1_600_000_000, "mfu": 0.4125, "peak_memory_gib": 61.25}
SIX_SCALES = [
    NOISE | {"geometry": geometry, "estimate": estimate}
    for geometry in ("euclidean", "manhattan", "nuclear")
    for estimate in ("plug_in", "cross_fitted")
]
MUST = ("step 3,700", "loss 4.873", "586k tok/s")


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (40, MUST, ("0:45",)),
        (60, (*MUST, "0:45:29", "batch 96"), ("lr", "noise")),
        (80, (*MUST, "0:45:29", "batch 96"), ("noise", "GiB")),
        (
            120,
            (*MUST, "0:45:29", "batch 96", "noise euc 42.9|42.9 man 42.9|42.9 nuc"),
            ("mfu",),
        ),
        (
            200,
            (*MUST, "1.60B/3.20B (50.0%)", "lr 3.7e-03", "mfu 41.2%", "61.2 GiB", "noise euc"),
            (),
        ),
    ],
)
def test_a_bar_keeps_what_matters_at_any_width(width, shown, left_out, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    view = open_view(file, width=width, progress="always")
    for record in (*SIX_SCALES, ON_GPU):
        view.write(record)
    view.close()
    bar = next(line for line in file.getvalue().splitlines() if "step 3,700" in line)
    assert all(text in bar for text in shown), bar
    assert not any(text in bar for text in left_out), bar
    assert "…" not in bar


def test_a_bar_is_there_before_the_first_step(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    view = open_view(file, width=60, progress="always")
    view.start()
    view.close()
    assert "the first step ..." in file.getvalue()


@pytest.mark.parametrize(("no_color", "styled"), [("", True), ("1", False)])
def test_lines_on_a_terminal_are_coloured_unless_the_environment_asks_for_none(
    no_color, styled, monkeypatch
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    file = Terminal()
    view = open_view(file, progress="never")
    view.write(TRAIN)
    view.close()
    assert ("\x1b[32mloss 4.873" in file.getvalue()) is styled
    assert "loss 4.873" in file.getvalue()


def test_progress_never_prints_lines_on_a_terminal():
    file = Terminal()
    view = open_view(file, progress="never", color_system=None)
    view.write(TRAIN)
    view.close()
    assert file.getvalue() == LINE.replace("noise scale 42.9 | ", "") + "\n"


def test_time_left_goes_by_the_tokens_of_this_process():
    # Resumed at 1.6B tokens, then 200M in 100 s each: the 1.2B to go take 600 s.
    file, seconds = Terminal(), [0.0]
    console = Console(
        file=file, width=100, color_system=None, get_time=lambda: seconds[0], force_terminal=True
    )
    view = ConsoleView(
        MetricsSettings(progress="always"),
        budget=3_200_000_000,
        run_directory=Path("outputs/demo"),
        console=console,
    )
    # Lines come in bursts: steps are read together once an interval.
    points = ((0.0, 16), (100.0, 17), (100.0, 18), (200.0, 20))
    for now, tokens in ((now, 100_000_000 * tokens) for now, tokens in points):
        seconds[0] = now
        view.write(TRAIN | {"tokens": tokens})
    view.close()
    assert "0:10:00" in file.getvalue()


def test_time_left_at_the_first_step_goes_by_that_steps_speed():
    (line,) = printed(TRAIN | {"tokens": 2_000_000_000, "tokens_per_second": 1e6})
    assert line.endswith(" | 1.00M tok/s | 20 min 00 s left")
    (line,) = printed(TRAIN | {"tokens": 3_300_000_000})
    assert line.endswith(" | 586k tok/s")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (485_000_000, "485M"),
        (3_200_000_000, "3.20B"),
        (1.5e12, "1.50T"),
    ],
)
def test_a_short_number_has_three_digits_and_a_unit(value, text):
    assert short_number(value) == text


def test_an_exact_short_number_has_no_digit_too_many():
    exact = [short_number(value, exact=True) for value in (0, 500, 2500, 1e6, 3.2e9)]
    assert exact == ["0", "500", "2.5k", "1M", "3.2B"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (151.4, "2 min 31 s"), (59.97, "1 min 00 s"), (18120, "5 h 02 min")],
)
def test_a_duration_has_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_the_closing_table_says_loss_speed_and_where_the_record_is():
    records = [
        TRAIN | {"step": 1, "samples": 96, "step_seconds": 30.0},
        {"kind": "validation", "step": 1, "tokens": 485_000_000, "loss": 4.5},
        TRAIN | {"step": 2, "samples": 192, "step_seconds": 121.0},
        {"kind": "validation", "step": 2, "tokens": 485_000_000, "loss": 4.6},
    ]
    summary = {"state": "finished", **summarize(records)}
    assert closing_table(summary, Path("outputs/demo")) == [
        "finished: 2 steps, 485M tokens, 2 min 31 s of training",
        "  validation loss  4.6000 (lowest 4.5000 at step 1)",
        "  speed            586k tok/s (median step)",
        "  run record       outputs/demo/metrics.jsonl",
        "  summary          outputs/demo/summary.json",
    ]


def test_the_closing_table_of_a_run_without_validation():
    summary = {"state": "finished", **summarize([])}
    lines = closing_table(summary, Path("outputs/demo"))
    assert lines[1:3] == ["  validation loss  not measured", "  speed            no steps"]
