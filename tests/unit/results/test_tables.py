"""The tables: hand-made run records in, numbers that can be checked in the head out."""

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.results.frame import to_curve, with_losses
from gns_pretrain.results.layouts import LAYOUTS
from gns_pretrain.results.render import FORMATS, _escape_latex
from gns_pretrain.results.tables import (
    best_score,
    by_cell,
    make_table,
    median_steps,
    reduction_by_first_reaching,
    reduction_by_total_steps,
)
from tests.unit.run_records import write_curve, write_run

ROOT = Path(__file__).parents[3]
REFERENCE = Path(os.environ.get("GNS_REFERENCE", ROOT.parent / "shared" / "reference"))


def run(points, total):
    """A run with evaluations [(step, loss), ...] and so many steps."""
    return {"steps": total, "read": lambda score: to_curve(points)}


# A baseline whose lowest loss, 4.0, is at step 80 of 100.
BASELINE = run([(20, 8.0), (40, 6.0), (60, 5.0), (80, 4.0), (100, 4.5)], total=100)


def adaptive(*losses, total=50):
    """A run that is evaluated every 10 steps."""
    return run([(10 * number, loss) for number, loss in enumerate(losses, start=1)], total)


def seeds(runs):
    """Runs of one cell by seed."""
    rows = [{"name": "a run", "cell": "a", "seed": seed} | row for seed, row in runs.items()]
    return by_cell(with_losses(pd.DataFrame(rows))[0])["a"]


# ---- arithmetic


def test_a_loss_is_the_mean_of_minima_with_the_sample_deviation():
    # Minima 3 and 5, which are not the last losses: mean 4, deviation sqrt((1 + 1) / 1).
    runs = {0: adaptive(9.0, 3.0, 3.5), 7: adaptive(5.0, 8.0)}
    statistic = best_score(seeds(runs), "loss")
    assert statistic.value == 4.0
    assert statistic.deviation == pytest.approx(2**0.5)
    assert statistic.seeds == (0, 7)


def test_one_seed_has_no_deviation():
    assert best_score(seeds({0: BASELINE}), "loss").deviation is None


def test_first_reaching_counts_from_the_first_evaluation_at_or_below_the_baselines_minimum():
    # Loss 4.0 exactly at step 20, below at 30: reached at 20. 1 - 20 / 80 = 75 %, of its minimum's
    # step, not of its 100 steps.
    statistic = reduction_by_first_reaching(
        seeds({0: adaptive(9.0, 4.0, 3.0)}), seeds({0: BASELINE})
    )
    assert (statistic.value, statistic.reached, statistic.seeds) == (75.0, 1, (0,))


def test_a_run_that_never_reaches_has_no_reduction():
    statistic = reduction_by_first_reaching(
        seeds({0: adaptive(9.0, 5.0, 4.001)}), seeds({0: BASELINE})
    )
    assert (statistic.value, statistic.reached, statistic.seeds) == (None, 0, (0,))


def test_the_median_is_over_the_seeds_that_reach_and_their_share_is_reported():
    runs = {0: adaptive(9.0, 4.0), 1: adaptive(4.0), 2: adaptive(9.0, 9.0), 3: adaptive(9, 9, 9, 4)}
    statistic = reduction_by_first_reaching(seeds(runs), seeds(dict.fromkeys(range(4), BASELINE)))
    # 1 - 20/80, 1 - 10/80, never, 1 - 40/80
    assert statistic.value == 75.0
    assert (statistic.reached, len(statistic.seeds)) == (3, 4)


def test_runs_are_compared_with_the_baseline_of_their_own_seed():
    # Seed 0 has to reach 4.0 and does at once; seed 1 has to reach 1.0 and never does.
    low = run([(100, 1.0)], total=100)
    runs = {1: adaptive(2.0), 0: adaptive(4.0)}
    statistic = reduction_by_first_reaching(seeds(runs), seeds({0: BASELINE, 1: low, 2: low}))
    assert (statistic.value, statistic.reached, statistic.seeds) == (87.5, 1, (0, 1))


def test_the_reduction_by_total_steps_is_the_median_of_the_paired_ratios():
    half = run([(50, 9.0)], total=50)
    runs = {seed: adaptive(9.0, total=total) for seed, total in enumerate((20, 40, 10))}
    baselines = seeds({0: BASELINE, 1: BASELINE, 2: half})
    statistic = reduction_by_total_steps(seeds(runs), baselines)
    assert statistic.value == pytest.approx(80.0)  # of 80, 60 and 80 %
    assert reduction_by_total_steps(seeds({0: runs[1]}), baselines).value == 60.0


def test_median_steps_of_two_seeds_lie_between_them():
    runs = {0: adaptive(9.0, total=10), 1: adaptive(9.0, total=13)}
    assert median_steps(seeds(runs)).value == 11.5


# ---- from run directories


@pytest.fixture
def outputs(tmp_path):
    """Table 2 of Signum with two seeds, and of Muon with one that never reaches."""
    write = lambda cell, evaluations, **more: write_run(  # noqa: E731
        tmp_path, "table2", cell, evaluations, **more
    )
    for seed, loss in ((0, 4.0), (1, 5.0)):
        write("signum_small", [(10, 9.0), (80, loss)], steps=100, seed=seed)
        write("signum_large", [(25, loss + 1)], seed=seed)
        write("signum_euclidean", [(40, loss)], seed=seed)
        write("signum_adaptive", [(20, loss), (30, loss - 1)], steps=50, seed=seed)
    write("muon_small", [(100, 3.0)])
    write("muon_adaptive", [(40, 3.1)])
    return tmp_path


def made(*sources, table="table2", **more):
    return make_table(table, [str(source) for source in sources], **more)


def line(table, label, column=None):
    """A row of a table by its first labels: entries as texts, or one of them."""
    rows = list(csv.reader(io.StringIO(FORMATS["csv"](table))))
    row = next(row for row in rows[1:] if " ".join(row).startswith(label))
    values = dict(zip(rows[0], row, strict=True))
    return values if column is None else values[column]


def test_table_2_reads_run_directories(outputs):
    table = made(outputs)
    signum = line(table, "Signum")
    assert float(signum["validation loss: B = 16"]) == 4.5
    assert float(signum["validation loss: B = 16, standard deviation"]) == pytest.approx(0.5**0.5)
    assert float(signum["validation loss: B = 64"]) == 5.5
    assert float(signum["validation loss: Euclidean adaptive"]) == 4.5
    assert float(signum["validation loss: adaptive"]) == 3.5
    assert float(signum["steps reduction (%): first reaching"]) == 75.0
    assert signum["steps reduction (%): seeds reaching"] == "2/2"
    assert float(signum["steps reduction (%): total steps"]) == 50.0
    assert table.scale == "demo"


def test_a_run_that_never_reaches_shows_a_dash(outputs):
    muon = line(made(outputs), "Muon")
    assert muon["steps reduction (%): first reaching"] == "-"
    assert muon["steps reduction (%): seeds reaching"] == "0/1"
    assert float(muon["steps reduction (%): total steps"]) == pytest.approx(60.0)


def test_signsgd_is_compared_with_the_large_batch_and_the_others_with_the_small():
    baselines = {
        entry.cell: entry.baseline for entry in LAYOUTS["table2"].entries if entry.baseline
    }
    assert baselines.pop("signsgd_adaptive") == "signsgd_large"
    assert all(base == cell.replace("adaptive", "small") for cell, base in baselines.items())
    assert len(baselines) == 4


def test_cells_with_missing_seeds_are_marked_and_listed(outputs):
    shutil.rmtree(outputs / "table2-signum_adaptive-demo-seed1")
    text = FORMATS["text"](made(outputs))
    assert "* missing seeds: signum_adaptive lacks 1" in text
    assert "* missing seeds: muon_small lacks 1" in text
    assert "* not paired: signum_adaptive and signum_small do not both have seeds 1" in text
    signum = next(line for line in text.splitlines() if "Signum" in line)
    words = [word.strip() for word in signum.split("│")]
    assert words[2:9] == [
        "4.5000 ± 0.7071",
        "5.5000 ± 0.7071",
        "4.5000 ± 0.7071",
        "↓3.0000*",
        "75.00*",
        "1/1*",
        "50.00*",
    ]


def test_cells_without_runs_are_listed(outputs):
    table = made(outputs)
    absent = table.notes[0].removeprefix("no run: ").split(", ")
    assert "adamw_small" in absent
    assert "muon_large" in absent
    assert "signum_small" not in absent
    assert line(table, "AdamW", "steps reduction (%): first reaching") == ""


def test_unfinished_runs_are_not_counted_but_listed(outputs):
    write_run(outputs, "table2", "signum_adaptive", [(1, 0.1)], seed=2, finished=False)
    table = made(outputs)
    assert float(line(table, "Signum", "validation loss: adaptive")) == 3.5
    listed = [note for note in table.notes if note.startswith("not counted, unfinished")]
    assert listed == [f"not counted, unfinished: {outputs / 'table2-signum_adaptive-demo-seed2'}"]


def test_runs_of_no_table_or_another_one_are_ignored(outputs):
    write_run(outputs, "table8", "constant_small", [(1, 0.1)])
    write_run(outputs, None, "signum_small", [(1, 0.1)], name="mine")
    assert float(line(made(outputs), "Signum", "validation loss: B = 16")) == 4.5


def test_a_folder_given_twice_counts_once(outputs):
    table = made(outputs, outputs / "table2-muon_small-demo-seed0")
    assert not [note for note in table.notes if "of the same settings" in note]


def test_what_trackers_keep_inside_a_run_is_not_taken_for_one(outputs):
    inside = outputs / "table2-muon_small-demo-seed0" / "wandb" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("table: {value: table2}")
    assert line(made(outputs), "Muon", "validation loss: B = 16, seeds") == "1"


# ---- which runs may stand together


def test_several_scales_need_a_choice(outputs):
    write_run(outputs, "table2", "signum_small", [(10, 1.0)], scale="h200")
    with pytest.raises(InputError, match=r"several scales, demo, h200; .*--scale demo"):
        made(outputs)
    assert float(line(made(outputs, scale="h200"), "Signum", "validation loss: B = 16")) == 1.0
    assert float(line(made(outputs, scale="demo"), "Signum", "validation loss: B = 16")) == 4.5
    with pytest.raises(InputError, match="--scale paper: no run of table2 has it; they have demo"):
        made(outputs, scale="paper")


def test_two_variants_of_a_cell_are_an_error_that_names_runs_and_settings(outputs):
    variant = {"batch_size__theta": 0.2, "batch_size__estimate": "cross_fitted"}
    write_run(outputs, "table2", "signum_adaptive", [(10, 1.0)], name="cross", **variant)
    with pytest.raises(InputError) as caught:
        made(outputs)
    message = str(caught.value)
    assert "cell signum_adaptive" in message
    assert str(outputs / "cross") in message
    assert str(outputs / "table2-signum_adaptive-demo-seed0") in message
    assert "batch_size.theta: 0.2 and 0.6" in message
    assert "batch_size.estimate: cross_fitted and plug_in" in message
    assert "\n" not in message


def test_other_seeds_of_another_variant_are_not_mixed_in_either(outputs):
    write_run(outputs, "table2", "muon_adaptive", [(9, 1.0)], seed=1, optimizer__lr=0.5)
    with pytest.raises(InputError, match=r"optimizer.lr: 0.001 and 0.5"):
        made(outputs)


def test_where_chooses_among_variants_and_constant_batches_stay(outputs):
    variant = {"batch_size__theta": 0.2, "batch_size__estimate": "cross_fitted"}
    for seed in (0, 1):
        name = f"cross-seed{seed}"
        write_run(
            outputs, "table2", "signum_adaptive", [(10, 1.0)], name=name, seed=seed, **variant
        )
    plug_in = made(outputs, where=["batch_size.estimate=plug_in"])
    assert float(line(plug_in, "Signum", "validation loss: adaptive")) == 3.5
    crossed = made(outputs, where=["batch_size.estimate=cross_fitted"])
    assert float(line(crossed, "Signum", "validation loss: adaptive")) == 1.0
    assert float(line(crossed, "Signum", "validation loss: B = 16")) == 4.5
    assert float(line(crossed, "Signum", "steps reduction (%): first reaching")) == 87.5
    by_theta = made(outputs, where=["batch_size.theta=2e-1", "seed=1"])
    assert line(by_theta, "Signum", "validation loss: adaptive, seeds") == "1"


def test_where_names_what_there_is(outputs):
    with pytest.raises(InputError, match=r"batch_size.theta=0.9: no run has it; they have 0.6"):
        made(outputs, where=["batch_size.theta=0.9"])
    with pytest.raises(InputError, match=r"no run has that setting; did you mean batch_size.theta"):
        made(outputs, where=["batch_size.thetta=0.9"])
    with pytest.raises(InputError, match="is not key=value"):
        made(outputs, where=["theta"])


def test_settings_that_a_constant_batch_does_not_use_do_not_set_runs_apart(outputs):
    other = {"batch_size__theta": 0.3, "metrics__log_every": 5, "noise_scale__every_steps": 3}
    write_run(outputs, "table2", "muon_small", [(90, 2.0)], seed=1, **other)
    assert line(made(outputs), "Muon", "validation loss: B = 16, seeds") == "2"


def test_a_repeated_run_counts_once_and_the_later_folder_stands(outputs):
    first = outputs / "table2-muon_small-demo-seed0"
    write_run(outputs, "table2", "muon_small", [(90, 2.0)], name=f"{first.name}-2")
    table = made(outputs)
    assert float(line(table, "Muon", "validation loss: B = 16")) == 2.0
    assert f"not counted: {first}, of the same settings and seed as {first}-2" in table.notes


def test_runs_on_different_budgets_are_no_table(outputs):
    write_run(outputs, "table2", "adamw_small", [(90, 2.0)], token_budget=5)
    with pytest.raises(InputError, match=r"two runs of table2 have .*token_budget: .*"):
        made(outputs)


def test_runs_on_different_data_are_no_table(outputs):
    other = outputs / "table2-muon_small-demo-seed0"
    for folder in outputs.glob("*-seed*"):
        data = {"data_fingerprint": "b" if folder == other else "a"}
        (folder / "run.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"two runs .*data_fingerprint: (a and b|b and a)"):
        made(outputs)
    table = made(outputs, where=["data_fingerprint=a"])
    assert any("muon_small" in note for note in table.notes), table.notes


def test_nothing_to_make_a_table_of_is_reported_in_one_line(tmp_path):
    with pytest.raises(InputError, match="table2 of what"):
        made()
    with pytest.raises(InputError, match="is not a folder"):
        made(tmp_path / "missing")
    curves = write_curve(tmp_path / "curves" / "signum_64.csv", [(1, 9.0)])
    with pytest.raises(InputError, match=f"no run, but 1 CSV file.*signsgd_small={curves} "):
        made(curves.parent)
    write_run(tmp_path, "table8", "constant_small", [(1, 0.1)])
    with pytest.raises(InputError, match=r"none of 1 run belongs to table2 .*table8.*=table2"):
        made(tmp_path)
    write_run(tmp_path, "table2", "signum_small", [(1, 0.1)], finished=False)
    with pytest.raises(InputError, match="no run of table2 is finished"):
        made(tmp_path)


# ---- the other tables


def test_table_3_compares_with_its_baseline(tmp_path):
    write_run(tmp_path, "table3", "adamw_baseline", [(80, 4.0)], batch_size__initial=256)
    write_run(tmp_path, "table3", "adamw_adaptive", [(20, 4.0)], steps=40)
    table = made(tmp_path, table="table3")
    row = line(table, "AdamW")
    assert float(row["validation loss: B = 256"]) == 4.0
    assert float(row["steps reduction (%): first reaching"]) == 75.0
    assert float(row["steps reduction (%): total steps"]) == 50.0


def test_table_8_has_median_steps_and_batches_of_its_runs(tmp_path):
    for seed, steps in enumerate((30, 10, 11)):
        write_run(tmp_path, "table8", "adaptive_large_scaled", [(10, 3.0)], seed=seed, steps=steps)
        write_run(tmp_path, "table8", "constant_small", [(10, 4.0)], seed=seed, steps=steps + 1)
    table = made(tmp_path, table="table8")
    adaptive_row = line(table, "adaptive 64 on")
    assert float(adaptive_row["validation loss"]) == 3.0
    assert float(adaptive_row["median steps"]) == 11
    assert float(line(table, "constant 16")["median steps"]) == 12


def test_table_9_sets_two_geometries_side_by_side(tmp_path):
    write_run(tmp_path, "table9", "euclidean_small", [(10, 4.0)], batch_size__geometry="euclidean")
    write_run(tmp_path, "table9", "manhattan_small", [(20, 3.0)])
    table = made(tmp_path, table="table9")
    assert float(line(table, "Euclidean 16")["median steps"]) == 10
    assert float(line(table, "Manhattan 16")["validation loss"]) == 3.0


def test_what_has_no_run_is_named_by_its_role(tmp_path):
    write_run(tmp_path, "table8", "constant_small", [(10, 4.0)])
    table = made(tmp_path, table="table8")
    assert line(table, "constant middle", "validation loss") == ""
    assert line(table, "adaptive large on", "median steps") == ""


def test_theta_sensitivity_shows_the_thetas_of_its_runs(tmp_path):
    for cell, theta in (("theta_low", 0.25), ("theta_middle", 0.6)):
        write_run(tmp_path, "theta_sensitivity", cell, [(9, 4.0)], batch_size__theta=theta)
    table = made(tmp_path, table="theta_sensitivity")
    assert line(table, "0.25", "median steps") == "9.0"
    assert line(table, "0.6", "validation loss") == "4.0"


# ---- the paper's values and published curves


@pytest.mark.parametrize(
    ("table", "cell", "scale", "beside"),
    [
        ("table2", "signum_small", "demo", False),
        ("table2", "signum_small", "paper", True),
        ("table3", "signum_baseline", "paper", False),
        ("table3", "signum_baseline", "paper_1b", True),
    ],
)
def test_the_papers_values_stand_beside_ours_at_its_scale_alone(
    tmp_path, table, cell, scale, beside
):
    write_run(tmp_path, table, cell, [(9, 4.0)], scale=scale)
    text = FORMATS["text"](made(tmp_path, table=table))
    assert ("│   paper   │" in text) == beside


def test_curves_take_the_place_of_runs_with_seeds_by_name_or_number(tmp_path, monkeypatch):
    for seed, loss in ((1, 3.0), (2, 5.0)):
        write_curve(tmp_path / "seeds" / f"seed_{seed}.csv", [(1, 9.0), (40, loss)])
    one = write_curve(tmp_path / "one.csv", [(100, 6.0)])
    two = write_curve(tmp_path / "two.csv", [(100, 2.0)])
    monkeypatch.setenv("HOME", str(tmp_path))
    table = made("muon_adaptive=~/seeds", f"muon_small={one}", f"muon_small={two}")
    muon = line(table, "Muon")
    assert float(muon["validation loss: adaptive"]) == 4.0
    assert float(muon["validation loss: B = 64"]) == 4.0
    # Seed 1 alone has both: number 1 of the baselines is two.csv, whose 2.0 seed_1.csv misses.
    assert muon["steps reduction (%): seeds reaching"] == "0/1"
    assert table.scale is None
    assert "* not paired: muon_adaptive and muon_small do not both have seeds 0, 2" in table.notes


def test_bad_curves_are_refused(tmp_path, outputs):
    curve = write_curve(tmp_path / "curves" / "one.csv", [(100, 6.0)])
    with pytest.raises(InputError, match=r"table2 has no such cell; use one of signsgd_small"):
        made(f"muon_tiny={curve}")
    with pytest.raises(InputError, match=r"missing.csv: there is no such file"):
        made("muon_small=missing.csv")
    with pytest.raises(InputError, match="muon_small is given as a published curve, and by runs"):
        made(outputs, f"muon_small={curve}")
    with pytest.raises(InputError, match="choose among runs, and only curves are given"):
        made(f"muon_small={curve}", scale="demo")
    empty = write_curve(tmp_path / "curves" / "empty.csv", [(1, "")], batch_size=[64])
    with pytest.raises(InputError, match="holds no validation loss"):
        made(f"muon_small={empty}")


def test_the_published_curves_give_the_papers_steps_reduction():
    folder = REFERENCE / "figure2"
    if not folder.is_dir():
        pytest.skip("needs the published curves; GNS_REFERENCE names their folder")
    names = {"small": "64", "large": "256", "adaptive": "gns"}
    table = made(
        *(f"signum_{cell}={folder / f'signum_{name}.csv'}" for cell, name in names.items()),
        *(f"muon_{cell}={folder / f'MUON_{name}.csv'}" for cell, name in names.items()),
    )
    rows = {
        label: [entry.statistic and round(entry.statistic.value or -1, 2) for entry in entries]
        for (label,), entries in table.rows
    }
    assert rows["Signum"] == [3.38, 3.44, None, 3.37, 66.59, 66.59, 66.59]
    assert rows["Muon"] == [3.3, 3.34, None, 3.31, -1, -1, 66.36]
    text = FORMATS["text"](table)
    muon = next(line for line in text.splitlines() if "Muon" in line)
    assert [word.strip() for word in muon.split("│")][6:9] == ["-", "0/1", "66.36"]


def test_the_published_seeds_give_the_papers_loss():
    folder = REFERENCE / "signsgd_160m"
    if not folder.is_dir():
        pytest.skip("needs the published curves; GNS_REFERENCE names their folder")
    table = made(f"adaptive_small_scaled={folder}", table="table8")
    row = line(table, "adaptive 64 on")
    # Five of the paper's ten seeds, whose mean is 3.6817 with a deviation of 0.0094.
    assert float(row["validation loss"]) == pytest.approx(3.6819, abs=1e-4)
    assert float(row["validation loss, standard deviation"]) == pytest.approx(0.0100, abs=1e-4)


# ---- formats


def test_markdown_has_as_many_cells_in_every_line(outputs):
    text = FORMATS["markdown"](made(outputs))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert {row.count("|") for row in rows} == {9}
    assert rows[0].startswith("| optimizer | validation loss: B = 16 | validation loss: B = 64 |")
    assert "| Signum | 4.5000 ± 0.7071 | 5.5000 ± 0.7071 |" in text
    assert "| **3.5000 ± 0.7071** | 75.00 | 2/2 | 50.00 |" in text
    assert r"- no run: signsgd\_small" in text


def test_latex_has_as_many_cells_in_every_line(outputs):
    text = FORMATS["latex"](made(outputs))
    assert r"\begin{tabular}{lrrrrrrr}" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:-1]
    assert {row.count("&") for row in body} == {7}
    assert r"Signum & 4.5000 $\pm$ 0.7071 & " in text
    assert r"& \textbf{3.5000 $\pm$ 0.7071} & 75.00 &" in text
    assert r"optimizer & $B = 16$ & $B = 64$ & Euclidean" in text
    assert r"\caption{Constant and adaptive batches (scale demo). Validation loss: " in text
    assert r"\multicolumn{4}{c}{validation loss} & \multicolumn{3}{c}{steps reduction (\%)}" in text
    assert "no run: signsgd\\_small" in text


def test_the_best_is_the_lowest_of_a_row_or_of_the_column_where_a_row_has_one_loss(
    outputs, tmp_path_factory
):
    best = lambda table: [  # noqa: E731
        (filled.entry.cell, filled.statistic.value)
        for _, entries in table.rows
        for filled in entries
        if filled.best
    ]
    # Muon's small batch has 3.0, its adaptive one 3.1.
    assert best(made(outputs)) == [("signum_adaptive", 3.5), ("muon_small", 3.0)]
    folder = tmp_path_factory.mktemp("table8")
    for cell, loss in (("constant_small", 4.0), ("constant_large", 3.0)):
        write_run(folder, "table8", cell, [(10, loss)])
    table = made(folder, table="table8")
    assert best(table) == [("constant_large", 3.0)]
    assert "\n↓ the lowest loss" in FORMATS["text"](table)
    assert best(made(folder, table="table8", where=["batch_size.initial=16"])) == []


def test_latex_sets_a_batch_size_that_no_run_says_as_a_word():
    assert _escape_latex("B = 1,024 and B = small") == "$B = 1,024$ and $B$ = small"


def test_latex_escapes_what_it_would_obey(outputs):
    directory = outputs / "table2-signum_small-demo-seed0"
    directory.rename(directory.with_name("a{b}$c^d~e#f\\g"))
    write_run(outputs, "table2", "signum_small", [(90, 2.0)], name="z")
    notes = FORMATS["latex"](made(outputs)).partition(r"\end{tabular}")[2]
    assert r"a\{b\}\$c\textasciicircum d\textasciitilde e\#f\textbackslash g" in notes


def test_json_has_numbers_seeds_and_notes(outputs):
    content = json.loads(FORMATS["json"](made(outputs)))
    signum = next(row for row in content["rows"] if row["labels"] == {"optimizer": "Signum"})
    reaching = signum["entries"][4]
    assert (reaching["cell"], reaching["baseline"]) == ("signum_adaptive", "signum_small")
    assert reaching["ours"] == {
        "value": 75.0,
        "deviation": None,
        "seeds": [0, 1],
        "reached": 2,
    }
    assert content["scale"] == "demo"
    assert content["notes"][0].startswith("no run")


def with_seconds(outputs, seconds_of):
    """Append training steps to the records of Signum's runs: 100 steps each, of so many seconds."""
    for cell, seconds in seconds_of.items():
        for seed in (0, 1):
            path = outputs / f"table2-signum_{cell}-demo-seed{seed}" / "metrics.jsonl"
            steps = [
                {"kind": "train", "step": step, "loss": 1.0, "step_seconds": seconds}
                for step in range(1, 101)
            ]
            path.write_text(path.read_text() + "".join(json.dumps(s) + "\n" for s in steps))


def test_hours_stand_beside_the_steps_where_they_are_asked_for(outputs):
    with_seconds(outputs, {"small": 36.0, "adaptive": 108.0})
    plain, timed = made(outputs), made(outputs, hours=True)
    assert plain.headers == timed.headers[: len(plain.headers)]
    assert line(timed, "Signum") == line(plain, "Signum") | {
        "hours: baseline": "1.0",  # 100 steps of 0.01 hours
        "hours: adaptive": "3.0",
        "hours to the baseline's best: baseline": "0.8",  # at step 80
        "hours to the baseline's best: adaptive": "0.6",  # at step 20, of three times as long
    }
    muon = line(timed, "Muon")  # without a record of seconds, and one that never reaches
    assert muon["hours: adaptive"] == muon["hours to the baseline's best: adaptive"] == "-"
    assert any(
        text.startswith("hours to the baseline's best: until") for text in timed.explanations
    )


def test_a_table_of_loss_and_steps_has_hours_of_its_runs(tmp_path):
    write_run(tmp_path, "table8", "constant_small", [(10, 4.0)])
    table = made(tmp_path, table="table8", hours=True)
    assert line(table, "constant 16")["hours"] == "-"


def test_the_command_prints_a_table_or_one_line(outputs, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_table.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "scripts" / "make_table.py"), run_name="__main__")
        return exit_.value.code, capsys.readouterr()

    code, printed = call("table2", outputs, "--format", "csv")
    assert code == 0
    assert printed.out.startswith("optimizer,validation loss: B = 16,")
    assert printed.err.startswith("no run: ")
    code, refused = call("table2", outputs, "--scale", "paper")
    assert code == 2
    assert refused.err.count("\n") == 1
    assert refused.err.startswith("error: --scale paper")


def test_training_needs_no_pandas_and_a_table_names_the_extra_that_has_it():
    script = ROOT / "scripts" / "make_table.py"
    code = (
        "import runpy, sys, gns_pretrain.launch.train\n"
        "assert not {'pandas', 'matplotlib'} & set(sys.modules)\n"
        "sys.modules['pandas'] = None\n"
        "sys.argv = ['make_table.py', 'table2', 'outputs']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "pip install 'gns-pretrain[results]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_row_for_each_batch_that_adaptive_runs_begin_with_shows_it_and_not_the_baselines(
    tmp_path,
):
    for cell, steps in (("muon_baseline", 40), ("muon_adaptive", 50), ("muon_adaptive_large", 30)):
        run = write_run(
            *(tmp_path, "table10", cell, [(steps, 1.0)]),
            batch_size__initial={40: 64, 50: 32, 30: 128}[steps],
        )
        line = {"kind": "validation", "step": steps, "samples": 9, "loss": 1.0, "accuracy": 0.5}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    table = make_table("table10", [str(tmp_path)])
    rows = {tuple(labels): entries for labels, entries in table.rows if labels[0] == "Muon"}
    saved = {labels: entries[-1].statistic.value for labels, entries in rows.items()}
    assert saved == {("Muon", "32"): pytest.approx(-25.0), ("Muon", "128"): pytest.approx(25.0)}
    assert table.headers[0][1] == "B = 64"


def test_a_table_of_runs_on_the_embedded_digits_says_so(tmp_path):
    def write(cell, folder):
        run = write_run(
            *(tmp_path, "table4", cell, [(10, 1.0)]),
            data__path="data/imagewoof64",
            data__or_embedded=True,
        )
        origin = {"data_fingerprint": "a", "data": {"folder": folder, "num_images": 9}}
        (run / "run.json").write_text(json.dumps(origin))

    write("sgd_baseline", "/data/imagewoof64")
    assert not any("digits" in note for note in make_table("table4", [str(tmp_path)]).notes)
    write("sgd_adaptive", "/home/a/.cache/gns_pretrain/embedded-images-123")
    notes = make_table("table4", [str(tmp_path)]).notes
    assert "trained on the embedded digits: data/imagewoof64 was not there" in notes


def test_table_of_accuracies_takes_the_highest_and_the_first_step_that_reaches_it(tmp_path):
    def write(cell, evaluations):
        run = write_run(tmp_path, "table10", cell, [(step, 1.0) for step, _ in evaluations])
        lines = [
            {
                "kind": "validation",
                "step": step,
                "samples": 8 * step,
                "loss": 1.0,
                "accuracy": share,
            }
            for step, share in evaluations
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("sgd_baseline", [(10, 0.30), (20, 0.50), (30, 0.45)])
    write("sgd_adaptive", [(5, 0.20), (10, 0.55), (15, 0.40)])
    table = make_table("table10", [str(tmp_path)])
    (entries,) = [entries for labels, entries in table.rows if labels == ["SGD", "16"]]
    baseline, adaptive, first, share, total = (entry.statistic for entry in entries)
    assert (baseline.value, adaptive.value) == (pytest.approx(50.0), pytest.approx(55.0))
    assert [entry.best for entry in entries[:2]] == [False, True]
    assert (first.value, share.reached, total.value) == (
        pytest.approx(50.0),
        1,
        pytest.approx(50.0),
    )
    assert table.layout.label_titles == ("optimizer", "adaptive from")
    shown = FORMATS["text"](table)
    assert "↓55.00" in shown
    assert "the highest accuracy of those that are compared" in shown
    assert "a the step at which the adaptive run first has the baseline's highest accuracy" in shown
