"""The replay: recorded noise scales in, the batch sizes and learning rates of the run out."""

import csv
import json
import math
import os
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.launch.train import launch
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.results.replay import main
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.tracking.settings import MetricsSettings
from tests.settings import SEQUENCE_LENGTH, small_run

REFERENCE = Path(
    os.environ.get("GNS_REFERENCE", Path(__file__).parents[3].parent / "shared" / "reference")
)
COLUMNS = {
    "step": "_step",
    "tokens": "n_tokens_seen",
    "batch": "batch_size/global_batch_size",
    "lr": "lr",
    "ema": "adaptive_batch_metrics/gns_ema",
}
OURS = {
    "step": "trainer/step",
    "tokens": "trainer/tokens",
    "batch": "train/batch_size",
    "lr": "train/lr",
    "ema": "noise/manhattan/plug_in/noise_scale_ema",
}
LENGTH, STEPS, PEAK = 10, 500, 3e-3
BUDGET = STEPS * 64 * LENGTH
OPTIONS = ["--theta", "0.6", f"--token-budget={BUDGET}"]


def made_up_run(*, measured_every=20, theta=0.6, ema=lambda step: 12.0 + step**2 / 250):
    """A run written down by a plain loop of its own: 8 ranks, sizes as in the published runs."""
    sizes = [64, 96, 128, *range(256, 4096, 128)]
    warmup = math.floor(0.15 * STEPS)
    rows, batch, samples, known, step = [], 64, 0, None, 0
    while samples * LENGTH < BUDGET:
        step += 1
        if step % 10 == 0 and samples >= warmup * 64 and known is not None:
            batch = max([batch, *(size for size in sizes if size <= known / theta**2)])
        virtual = samples / 64 + 1
        if virtual <= warmup:
            factor = virtual / warmup
        else:
            factor = (1 + math.cos(math.pi * (virtual - warmup - 1) / (STEPS - warmup - 1))) / 2
        samples += batch
        if step == 1 or step % measured_every == 0:
            known = ema(step)
            rows.append(
                {
                    "step": step,
                    "tokens": float(samples * LENGTH),
                    "batch": float(batch),
                    "lr": PEAK * factor * math.sqrt(batch / 64),
                    "ema": known,
                }
            )
    assert rows[-1]["batch"] > 256  # every kind of growth has happened
    return rows


def write(path, rows, columns=COLUMNS):
    names = [key for key in columns if key in rows[0]] + [k for k in rows[0] if k not in columns]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([columns.get(name, name) for name in names])
        writer.writerows([[row[name] for name in names] for row in rows])
    return str(path)


@pytest.fixture
def rows():
    return made_up_run()


# The published runs


@pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"no published curves in {REFERENCE}; set GNS_REFERENCE"
)
@pytest.mark.parametrize("seed", range(1, 6))
def test_published_signsgd_run_is_replayed_to_the_last_token(seed, capsys):
    path = REFERENCE / "signsgd_160m" / f"seed_{seed}.csv"
    code = main([str(path), "--theta", "0.6", "--json"])
    replayed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert replayed["first_difference"] is None
    assert replayed["rows"] > 90
    for step in replayed["path"]:
        recorded, mine = step["recorded"], step["replayed"]
        assert mine["batch_size"] == recorded["batch_size"]
        assert mine["tokens"] == recorded["tokens"]
        assert mine["lr"] == pytest.approx(recorded["lr"], rel=1e-9, abs=0)
    assert replayed["path"][-1]["replayed"]["batch_size"] >= 640


@pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"no published curves in {REFERENCE}; set GNS_REFERENCE"
)
@pytest.mark.parametrize(
    ("option", "code"), [("--theta=0.6", 0), ("--theta=0.61", 1), ("--decide-every-steps=100", 1)]
)
def test_published_figure_1_and_tokens_differ_under_other_settings(option, code):
    if "theta" in option:
        assert main([str(REFERENCE / "figure1" / "gns_l1.csv"), option]) == code
    assert main([str(REFERENCE / "signsgd_160m" / "seed_1.csv"), option]) == code


# The layout of the published curves, made up


def test_file_that_follows_the_rules_is_replayed_and_printed_side_by_side(rows, tmp_path, capsys):
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "in the file" in out
    assert "replayed" in out
    assert f"the same path in {len(rows)} rows" in out
    for before, row in pairwise(rows):
        printed = f"{row['tokens']:,.0f}" in out
        assert printed == (row["batch"] != before["batch"] or row is rows[-1])


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("batch", lambda value: value + 32, "batch size"),
        ("tokens", lambda value: value + 1, "tokens"),
        ("lr", lambda value: value * (1 + 1e-8), "lr"),
    ],
)
def test_first_row_that_differs_is_named_and_the_exit_code_is_1(
    column, change, expected, rows, tmp_path, capsys
):
    for index in (7, 9):
        rows[index][column] = change(rows[index][column])
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    # Row 1 of the file is its header.
    assert last.startswith(f"first difference at step {rows[7]['step']} (row 9): {expected} ")


def test_learning_rate_within_a_billionth_is_the_same(rows, tmp_path):
    for row in rows:
        row["lr"] *= 1 + 0.9e-9
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--theta=0.5"],
        ["--rounding=up"],
        ["--cap=256"],
        ["--num-ranks=4"],
        ["--micro-batch-step=1"],
        ["--micro-batch-max=12"],
        ["--warmup-fraction=0.4"],
        ["--decide-every-steps=1"],
        ["--lr-scaling=linear"],
        ["--peak-lr=0.002"],
        ["--target=maximum_efficiency"],
    ],
)
def test_another_controller_takes_another_path(options, rows, tmp_path):
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS, *options]) == 1


def test_kappa_of_theta_is_the_same_controller(rows, tmp_path):
    words = [write(tmp_path / "run.csv", rows), *OPTIONS, "--target=kappa", "--kappa=0.16"]
    assert main(words) == 0


@pytest.mark.parametrize("option", ["--policy=norm_test", "--noise-decay=0.5"])
def test_averages_alone_do_not_serve_who_needs_single_measurements(option, rows, tmp_path, capsys):
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS, option]) == 2
    assert "only averages: they cannot be averaged anew" in capsys.readouterr().err


def test_what_a_file_does_not_hold_is_not_compared(rows, tmp_path):
    for row in rows:
        del row["lr"], row["tokens"]
    words = [write(tmp_path / "run.csv", rows), *OPTIONS, f"--sequence-length={LENGTH}"]
    assert main(words) == 0


def test_empty_cells_are_no_measurement_and_no_comparison(rows, tmp_path):
    before_the_warm_up_ends = rows[2]
    before_the_warm_up_ends["ema"] = before_the_warm_up_ends["lr"] = ""
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS]) == 0
    measured = next(row for row, after in pairwise(rows) if after["batch"] > 64)
    measured["ema"] = ""
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS]) == 1


def test_file_that_does_not_name_whose_average_it_holds_is_taken_for_what_was_asked(
    rows, tmp_path, capsys
):
    words = [write(tmp_path / "run.csv", rows), *OPTIONS]
    assert main([*words, "--geometry=euclidean", "--estimate=debiased"]) == 0
    note = "does not say whose noise scale adaptive_batch_metrics/gns_ema is; taken as"
    assert f"{note} euclidean debiased" in capsys.readouterr().out
    assert main([write(tmp_path / "run.csv", rows, OURS), *OPTIONS]) == 0
    assert note not in capsys.readouterr().out


def test_rows_before_the_first_step_are_left_out_and_reported(rows, tmp_path, capsys):
    before = dict(rows[0], step=0, tokens=0.0, ema=1e9)
    assert main([write(tmp_path / "run.csv", [before, *rows]), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "row 2: step 0 comes before the first one; left out" in out
    assert f"the same path in {len(rows)} rows" in out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            ["--policy=staged", "--stage-tokens", "160", "800", "--stage-sizes", "32", "64"],
            [16, 32, 32, 64],
        ),
        (["--policy=linear_ramp", "--ramp-size=48", "--ramp-tokens=1280"], [16, 20, 24, 28]),
        (["--policy=constant"], [16, 16, 16, 16]),
    ],
)
def test_plan_is_replayed_on_a_record_without_any_noise_scale(options, wanted, tmp_path):
    tokens = accumulate(size * LENGTH for size in wanted)
    plan = [
        {"step": step, "tokens": seen, "batch": size}
        for step, (size, seen) in enumerate(zip(wanted, tokens, strict=True), start=1)
    ]
    ranks = ["--num-ranks=1", "--micro-batch-size=4", "--micro-batch-max=4", "--min-samples=1"]
    words = [write(tmp_path / "run.csv", plan), *ranks, *options]
    assert main(words) == 0
    plan[-1]["batch"] += 4
    assert main([write(tmp_path / "run.csv", plan), *words[1:]]) == 1


def test_file_that_goes_on_past_the_budget_differs(rows, tmp_path, capsys):
    more = dict(rows[-1], step=rows[-1]["step"] + 500)
    assert main([write(tmp_path / "run.csv", [*rows, more]), *OPTIONS]) == 1
    assert "has reached its token budget" in capsys.readouterr().out


# W&B exports


def test_history_of_our_own_run_is_replayed(rows, tmp_path):
    assert main([write(tmp_path / "run.csv", rows, OURS), *OPTIONS]) == 0


def test_single_measurements_are_averaged_anew_when_a_decay_is_named(rows, tmp_path):
    noise, signal = "noise/manhattan/plug_in/noise", "noise/manhattan/plug_in/signal"
    averages = [0.0, 0.0]
    for index, row in enumerate(rows):
        row[noise], row[signal] = 50.0 + 40.0 * index**2, 1.0 + 0.01 * index
        averages = [
            0.5 * averages[0] + 0.5 * row[noise],
            0.8 * averages[1] + 0.2 * row[signal],
        ]
        row["corrected"] = (averages[0] / (1 - 0.5 ** (index + 1))) / (
            averages[1] / (1 - 0.8 ** (index + 1))
        )
    by_step = {row["step"]: row for row in rows}
    path = made_up_run(ema=lambda step: by_step[min(step, max(by_step))]["corrected"])
    for row in path:
        found = by_step.get(row["step"])
        if found is None:
            break
        row |= {noise: found[noise], signal: found[signal]}
    path = [row for row in path if noise in row]
    words = [write(tmp_path / "run.csv", path, OURS), *OPTIONS]
    assert main([*words, "--noise-decay=0.5", "--signal-decay=0.8"]) == 0
    assert main([*words, "--noise-decay=0.9", "--signal-decay=0.8"]) == 1


def panel(name):
    return {key: column if key == "step" else f"{name} - {column}" for key, column in OURS.items()}


def test_panel_export_is_read_past_the_runs_name_and_its_bounds(rows, tmp_path):
    for row in rows:
        row["a run - 1 - train/lr__MIN"] = row["a run - 1 - train/lr__MAX"] = 7.0
    assert main([write(tmp_path / "run.csv", rows, panel("a run - 1")), *OPTIONS]) == 0


def test_panel_export_of_several_runs_needs_the_name_of_one(rows, tmp_path, capsys):
    for row in rows:
        for key, column in OURS.items():
            if key != "step":
                row[f"other - {column}"] = 7
    words = [write(tmp_path / "run.csv", rows, panel("mine")), *OPTIONS]
    assert main(words) == 2
    assert "several runs; name one, as in --run" in capsys.readouterr().err
    assert main([*words, "--run=mine"]) == 0


def test_steps_that_a_resumed_run_repeats_count_once_and_are_reported(rows, tmp_path, capsys):
    lost = [dict(row, batch=7.0, ema=1e9) for row in rows[5:9]]
    assert main([write(tmp_path / "run.csv", [*rows[:5], *lost, *rows[5:]]), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert f"steps {rows[5]['step']} to {rows[8]['step']} come twice" in out


# Our own record


def write_our_record(folder, rows, config):
    """metrics.jsonl as a run writes it, of the measured steps alone, and its config.yaml."""
    lines = []
    for row in rows:
        split = {"batch_size": int(row["batch"]), "micro_batch_size": 8, "accumulation": 1}
        train = {"kind": "train", "step": row["step"], "tokens": int(row["tokens"])}
        lines.append(train | split | {"lr": row["lr"]})
        noise = {"kind": "noise", "step": row["step"], "estimate": "plug_in", "num_samples": 8}
        values = {"noise": 7.0, "signal": 7.0, "noise_ema": row["ema"], "signal_ema": 1.0}
        lines.append(noise | values | {"geometry": "manhattan"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return str(folder / "metrics.jsonl")


CONFIG = {
    "batch_size": {
        "policy": "adaptive",
        "initial": 64,
        "theta": 0.45,
        "micro_batch_max": 16,
        "micro_batch_step": 4,
        "shadows": [],
    },
    "noise_scale": {"min_samples": 8, "smoothing": {"noise_decay": 0.9, "signal_decay": 0.9}},
    "schedule": {"kind": "cosine", "warmup_fraction": 0.15, "final_fraction": 0.0},
    "optimizer": {"lr": PEAK},
    "micro_batch_size": 8,
    "token_budget": BUDGET,
}


def test_own_record_is_replayed_with_the_settings_beside_it(tmp_path):
    path = write_our_record(tmp_path, made_up_run(theta=0.45), CONFIG)
    assert main([path]) == 0
    assert main([path, "--theta=0.6"]) == 1
    assert main([str(tmp_path)]) == 0  # its run directory


def test_line_that_stands_twice_is_no_row_past_the_end(tmp_path):
    rows = made_up_run(theta=0.45)
    assert main([write_our_record(tmp_path, [*rows[:6], *rows[5:]], CONFIG)]) == 0


def test_constant_run_shows_what_the_adaptive_policy_would_have_chosen(tmp_path, capsys):
    config = CONFIG | {"batch_size": CONFIG["batch_size"] | {"policy": "constant"}}
    path = write_our_record(tmp_path, made_up_run(theta=0.45), config)
    assert main([path]) == 0
    assert "adaptive on manhattan plug_in, theta 0.45" in capsys.readouterr().out


def test_geometry_that_was_not_measured_is_named(tmp_path, capsys):
    path = write_our_record(tmp_path, made_up_run(), CONFIG)
    assert main([path, "--geometry=nuclear"]) == 2
    assert "no measurement of geometry nuclear" in capsys.readouterr().err


RAMP = {"policy": "linear_ramp", "ramp_size": 32, "ramp_tokens": 9 * 8 * SEQUENCE_LENGTH}


def test_run_that_grew_by_plan_and_measured_nothing_is_replayed(tmp_path, shards, capsys):
    # 1 rank in micro-batches of 2 begins at 8: fewer micro-batches than a measured run needs.
    config = small_run(
        tmp_path,
        shards,
        optimizer=SignumSettings(),
        batch_size=BatchSizeSettings(initial=8, **RAMP),
        metrics=MetricsSettings(log_every=1, progress="never"),
    )
    assert launch(config) == 0
    metrics = str(tmp_path / "small" / "metrics.jsonl")
    capsys.readouterr()
    assert main([metrics]) == 0
    assert "linear_ramp, rounded down, from 8 on" in capsys.readouterr().out
    assert main([metrics, "--ramp-size=16"]) == 1
    assert main([metrics, "--policy=adaptive"]) == 2
    assert "no measurement of geometry manhattan" in capsys.readouterr().err


def test_run_that_grew_by_progress_is_replayed_from_its_gains(tmp_path, shards, capsys):
    config = small_run(
        tmp_path,
        shards,
        optimizer=SignumSettings(),
        micro_batch_size=1,
        token_budget=60 * 8 * SEQUENCE_LENGTH,
        noise_scale=NoiseScaleSettings(["manhattan"], ["nested"], every_steps=2),
        batch_size=BatchSizeSettings(
            initial=8, policy="progress", price=0.2, decide_every_steps=2, warmup_fraction=0.0
        ),
        metrics=MetricsSettings(log_every=1, progress="never"),
    )
    assert launch(config) == 0
    metrics = str(tmp_path / "small" / "metrics.jsonl")
    capsys.readouterr()
    assert main([metrics]) == 0
    printed = capsys.readouterr().out
    assert "progress on manhattan nested, price 0.2, rounded down, from 8 on" in printed
    assert "the same path in" in printed
    sizes = [line["batch_size"] for line in read_records(Path(metrics)) if line["kind"] == "train"]
    assert sizes[-1] > 8
    assert main([metrics, "--price=0.001"]) == 1


@pytest.mark.parametrize(
    ("recorded", "options", "expected"),
    [
        (
            "adaptive",
            ["--policy=norm_test"],
            "norm_test on euclidean plug_in, theta 0.3, rounded up",
        ),
        ("adaptive", ["--policy=norm_test", "--theta=0.5"], "plug_in, theta 0.5, rounded up"),
        ("norm_test", [], "norm_test on euclidean plug_in, theta 0.45, rounded down"),
        ("norm_test", ["--policy=adaptive"], "adaptive on manhattan plug_in, theta 0.6, rounded d"),
        ("adaptive", ["--policy=adaptive"], "adaptive on manhattan plug_in, theta 0.45"),
    ],
)
def test_norm_test_and_other_policies_do_not_inherit_each_others_values(
    recorded, options, expected, tmp_path, capsys
):
    own = CONFIG["batch_size"] | {"policy": recorded, "rounding": "down", "lr_scaling": "sqrt"}
    path = write_our_record(tmp_path, made_up_run(), CONFIG | {"batch_size": own})
    text = Path(path).read_text()
    euclidean = text.replace('"manhattan"', '"euclidean"').splitlines(keepends=True)
    noise = [line for line in euclidean if '"noise"' in line]
    Path(path).write_text(text + "".join(noise))
    assert main([path, *options]) in (0, 1)
    assert expected in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column"),
        ("_step,lr\n1,2\n", "has no column noise/manhattan"),
        ("step,batch\n1,2\n", "has no column trainer/step or _step or Step; it has step, batch"),
        (
            "_step,batch_size/global_batch_size,adaptive_batch_metrics/gns_ema\n",
            "holds no batch size",
        ),
        (
            "_step,batch_size/global_batch_size,adaptive_batch_metrics/gns_ema\n1,64,big\n",
            "row 2: adaptive_batch_metrics/gns_ema is 'big' and not a number",
        ),
        (
            "_step,batch_size/global_batch_size,adaptive_batch_metrics/gns_ema\n1,64.5,1\n",
            "row 2: batch_size/global_batch_size is 64.5 and not a whole number",
        ),
        (
            "_step,batch_size/global_batch_size,adaptive_batch_metrics/gns_ema\ninf,64,1\n",
            "row 2: _step is inf and not a whole number",
        ),
        (
            "_step,batch_size/global_batch_size,adaptive_batch_metrics/gns_ema\n,64,1\n",
            "row 2: _step is empty",
        ),
    ],
)
def test_file_that_cannot_be_replayed_is_named_with_the_reason(text, expected, tmp_path, capsys):
    (tmp_path / "run.csv").write_text(text)
    assert main([str(tmp_path / "run.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'run.csv'}")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.csv"], "nowhere.csv: there is no such file"),
        (["run.csv", "--theta=0"], "theta=0.0 must be positive"),
        (["run.csv", "--initial=65"], "--initial=65"),
        (["run.csv", "--num-ranks=0"], "--num-ranks=0 must be positive"),
        (["run.csv", "--sequence-length=0"], "--sequence-length=0 must be positive"),
        (["run.csv", "--micro-batch-size=0"], "--micro-batch-size=0 must be positive"),
        (["run.csv", "--micro-batch-size=-8"], "--micro-batch-size=-8 must be positive"),
        (["run.csv", "--min-samples=0"], "--min-samples=0 must be positive"),
        (["run.csv", "--token-budget=-1"], "--token-budget=-1 must be positive"),
        (["run.csv", "--peak-lr=nan"], "--peak-lr=nan must be positive and finite"),
        (["run.csv", "--policy=linear_ramp"], "ramp_size=null must be at least 1"),
        (["run.csv", "--policy=staged"], "as in stage_tokens="),
        (
            ["run.csv", "--policy=linear_ramp", "--ramp-size=32", "--ramp-tokens=9"],
            "ramp_size=32 is below batch_size.initial=64",
        ),
    ],
)
def test_option_that_cannot_be_is_named(words, expected, rows, tmp_path, monkeypatch, capsys):
    write(tmp_path / "run.csv", rows)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_theta_that_is_tiny_wants_more_than_the_budget_holds(rows, tmp_path):
    assert main([write(tmp_path / "run.csv", rows), *OPTIONS, "--theta=1e-200"]) == 1
