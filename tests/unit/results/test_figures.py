"""Curves of runs and of published files, their bands over seeds, and the files drawn of them."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.results.figures import (
    MOST_POINTS,
    PANELS,
    draw,
    notes_on_ends,
    over_seeds,
    thinned,
)
from gns_pretrain.results.frame import (
    read_curves,
    to_curve,
)
from gns_pretrain.results.labels import (
    grouped,
    seed_in_name,
    without_seed,
)
from tests.unit.run_records import write_curve, write_run

ROOT = Path(__file__).parents[3]
REFERENCE = Path(os.environ.get("GNS_REFERENCE", ROOT.parent / "shared" / "reference"))


def curve(*points):
    return to_curve(points)


def write_lines(directory, lines):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """A run of two steps with two noise scales, the second of which its policy reads."""
    directory = write_run(tmp_path, "table2", "signum_adaptive", [(1, 5.0)], finished=False)
    noise = {"kind": "noise", "step": 2, "estimate": "plug_in"}
    train = {"kind": "train", "loss": 6.0, "lr": 0.5, "batch_size": 16}
    lines = [
        train | {"step": 1, "tokens": 100},
        {"kind": "validation", "step": 1, "tokens": 100, "loss": 5.0},
        noise | {"geometry": "euclidean", "noise_scale_ema": 7.0},
        noise | {"geometry": "manhattan", "noise_scale_ema": 9.0},
        train | {"step": 2, "tokens": 300, "batch_size": 32},
        {"kind": "validation", "step": 2, "tokens": 300, "loss": None},
    ]
    write_lines(directory, lines)
    return directory


# ---- reading


def test_a_record_gives_its_curves_over_steps_or_tokens(run):
    over_steps, over_tokens = read_curves(run), read_curves(run, axis="tokens")
    assert over_steps["loss"].index.tolist() == [1.0]
    assert over_steps["batch_size"].tolist() == [16.0, 32.0]
    assert over_tokens["batch_size"].index.tolist() == [100.0, 300.0]
    # A noise line has no tokens of its own.
    assert over_tokens["noise_scale/manhattan/plug_in"].index.tolist() == [300.0]


def test_the_noise_scale_is_that_of_the_policy_unless_another_is_named(run):
    def noise_scales(noise=None):
        curves = read_curves(run, noise=noise)
        return {name: curves[name].tolist() for name in curves if "noise_scale" in name}

    manhattan, euclidean = "noise_scale/manhattan/plug_in", "noise_scale/euclidean/plug_in"
    assert noise_scales() == {manhattan: [9.0]}
    assert noise_scales(("euclidean", "plug_in")) == {euclidean: [7.0]}
    assert noise_scales("all") == {euclidean: [7.0], manhattan: [9.0]}
    assert noise_scales(("nuclear", "plug_in")) == {}


def test_a_published_curve_gives_what_it_has(tmp_path):
    path = write_curve(tmp_path / "a.csv", [(1, 9.0), (5, 4.0)], batch_size=[64, 96], noise=["", 8])
    curves = read_curves(path)
    assert sorted(curves) == ["batch_size", "loss", "noise_scale"]
    assert curves["noise_scale"].index.tolist() == [5.0]
    with pytest.raises(InputError, match="n_tokens_seen"):
        read_curves(path, axis="tokens")


def test_what_a_resumed_run_did_again_replaces_what_it_did_before():
    resumed = curve((1, 9), (2, 8), (3, 7), (2, 6), (4, 5))
    assert resumed.index.tolist() == [1.0, 2.0, 4.0]
    assert resumed.tolist() == [9.0, 6.0, 5.0]


def test_names_lose_their_seed_and_nothing_else():
    names = {
        "table2-signum-adaptive-demo-seed3": "table2-signum-adaptive-demo",
        "table2-signum-demo-seed12-optimizer.lr=0.01": "table2-signum-demo-optimizer.lr=0.01",
        "signsgd_160m/seed_4.csv": "signsgd_160m",
        "figure1/gns_l1.csv": "gns_l1",
        "reseeded-run": "reseeded-run",
    }
    assert {name: without_seed(Path(name)) for name in names} == names
    assert [seed_in_name(Path(name)) for name in names] == [3, 12, 4, None, None]


def test_runs_are_grouped_by_name_and_folder_or_by_the_label_they_are_given(tmp_path, monkeypatch):
    for folder, seed in (("one", 2), ("one", 10), ("two", 1)):
        write_curve(tmp_path / folder / f"a_seed_{seed}.csv", [(1, 9.0)])
    lone = write_curve(tmp_path / "b=c.csv", [(1, 9.0)])
    one, two = tmp_path / "one", tmp_path / "two"
    groups = grouped([str(one), str(two), str(lone)])
    assert {label: [path.name for path in paths] for label, paths in groups.items()} == {
        "one/a": ["a_seed_2.csv", "a_seed_10.csv"],
        "two/a": ["a_seed_1.csv"],
        "b=c": ["b=c.csv"],
    }
    # Folders of one name do not make one group of two, nor does a label that a name is cut to.
    for outputs in ("x", "y"):
        write_curve(tmp_path / outputs / "one" / "a_seed_1.csv", [(1, 9.0)])
    assert [*grouped([f"{tmp_path}/x/one", f"{tmp_path}/y/one"])] == ["x", "y"]
    mine = write_curve(tmp_path / "mine.csv", [(1, 9.0)])
    runs = [write_curve(tmp_path / f"run-{name}.csv", [(1, 9.0)]) for name in ("small", "large")]
    assert [*grouped([f"small={mine}", *map(str, runs)])] == [
        "small",
        f"{tmp_path.name}/run-small",
        "large",
    ]
    labelled = grouped([f"B = 64={one}", f"B = 64={two}"])
    assert {label: len(paths) for label, paths in labelled.items()} == {"B = 64": 3}
    assert len(grouped([f"a={one}", f"a={one}"])["a"]) == 2
    swept = write_curve(tmp_path / "theta=3" / "run-lr=1.csv", [(1, 9.0)])
    assert grouped([f"B = 64={swept}"]) == {"B = 64": [swept]}
    with pytest.raises(InputError, match="there is no such file or folder"):
        grouped(["a=missing"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert grouped(["B = 64=~/b=c.csv", "~/theta=3"]) == {"B = 64": [lone], "run-lr=1": [swept]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither"):
        grouped([str(tmp_path / "empty")])


# ---- bands


def test_seeds_become_mean_and_sample_deviation_where_each_is_known():
    # Evaluated at 0, 10, 20 and at 5, 15: both are known from 5 to 15, one before and after.
    band = over_seeds([curve((0, 0), (10, 10), (20, 20)), curve((5, 7), (15, 17))])
    assert band.index.tolist() == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert band["mean"].tolist() == [0.0, 6.0, 11.0, 16.0, 20.0]
    assert band["count"].tolist() == [1, 2, 2, 2, 1]
    np.testing.assert_allclose(band["std"], [np.nan, *[np.sqrt(2.0)] * 3, np.nan])


def test_a_perplexity_is_interpolated_as_a_loss_and_averaged_as_itself():
    # In the middle the loss is 2 in one and 4 in the other.
    band = over_seeds([curve((0, 1), (1, 4), (2, 4)), curve((0, 1), (2, 3))], transform=np.exp)
    np.testing.assert_allclose(band["mean"].iloc[1], (np.exp(4) + np.exp(2)) / 2)


def test_a_batch_size_stays_until_it_changes():
    band = over_seeds([curve((0, 64), (10, 128)), curve((0, 64), (4, 64), (10, 64))], stepwise=True)
    assert band.index.tolist() == [0.0, 4.0, 10.0]
    assert band["mean"].tolist() == [64.0, 64.0, 96.0]
    band = over_seeds([curve((0, 64), (4, 128)), curve((0, 64), (10, 256))], stepwise=True)
    assert band["mean"].tolist() == [64.0, 96.0, 256.0]  # the first ends at 4


def test_a_single_run_is_drawn_through_its_own_points():
    band = over_seeds([curve((3, 1), (4, 2))], transform=np.exp)
    assert band.index.tolist() == [3.0, 4.0]
    assert list(band) == ["mean"]


def test_long_lines_keep_their_ends_and_lose_points_evenly():
    kept = thinned(pd.Series(np.arange(100_000.0))).to_numpy()
    assert len(kept) == MOST_POINTS
    assert (kept[0], kept[-1]) == (0.0, 99_999.0)
    assert np.diff(kept).max() < 52  # 100,000 / 2,000, rounded


# ---- files


def figure_size(path):
    """Width and height in the head of a PNG."""
    head = path.read_bytes()[:24]
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def test_a_figure_is_saved_as_png_and_pdf(tmp_path, run):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "a.png", tmp_path / "a.pdf"]
    published = write_curve(tmp_path / "a.csv", [(1, 9.0), (5, 4.0)], batch_size=[64, 96])
    drawn = draw({"ours": [read_curves(run)] * 2, "theirs": [read_curves(published)]}, paths)
    assert drawn == ["perplexity", "batch_size", "noise_scale", "lr"]
    assert figure_size(paths[0]) > (1000, 900)
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_every_panel_shows_what_it_names_with_a_unit(run, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    panels = [name for name in PANELS if name != "accuracy"]  # of images
    draw({"mine": [read_curves(run)]}, [tmp_path / "a.png"], panels=panels)
    shown = {axes.get_ylabel(): axes for axes in figures[0].axes if axes.get_visible()}
    assert set(shown) == {PANELS[name].label for name in panels}
    perplexity = shown["validation perplexity"]
    assert perplexity.get_yscale() == "log"
    assert perplexity.lines[0].get_ydata().tolist() == pytest.approx([np.exp(5.0)])
    assert shown["batch size (samples)"].lines[0].get_drawstyle() == "steps-post"
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["mine"]
    monkeypatch.undo()
    pyplot.close(figures[0])


def test_a_band_is_drawn_for_seeds_and_lines_for_each_of_them_when_asked(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    seeds = [{"loss": curve((1, 5), (9, loss))} for loss in (3, 4)]
    draw({"a": seeds}, [tmp_path / "a.png"])
    draw({"a": seeds}, [tmp_path / "a.png"], each_seed=True)
    counts = [(len(figure.axes[0].lines), len(figure.axes[0].collections)) for figure in figures]
    assert counts == [(1, 1), (2, 0)]
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def test_a_mean_goes_on_to_the_last_seeds_end_and_says_where_seeds_end(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    # As an adaptive batch makes them: of one budget, and of different numbers of steps.
    ends = (6, 8, 8, 9)
    seeds = [{"loss": curve((1, 5), (end, 3))} for end in ends]
    draw({"a": seeds}, [tmp_path / "a.png"], panels=["loss"])
    ticks, line = figures[0].axes[0].lines
    assert line.get_xdata()[-1] == 9.0
    assert line.get_ydata()[-1] == 3.0
    assert ticks.get_xdata().tolist() == [6.0, 8.0]
    (note,) = notes_on_ends({"a": seeds, "b": seeds[1:3]}, ["loss"], "step")
    assert note == "a is a mean over 4 to 6, 3 to 8, 1 to 9 (optimizer step)"
    texts = [text.get_text() for text in figures[0].legends[0].texts]
    assert texts == ["a (n = 4)", "mean ± std over n seeds"]
    monkeypatch.undo()
    pyplot.close(figures[0])


def test_noise_scales_of_one_run_share_a_panel_and_are_named(run, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    for noise in (None, "all"):
        curves = {"mine": [read_curves(run, noise=noise)]}
        draw(curves, [tmp_path / "a.png"], panels=["noise_scale"])
    one, several = (figure.axes[0] for figure in figures)
    assert one.get_title() == "Manhattan, plug-in: running average"
    names = [text.get_text() for text in several.get_legend().texts]
    assert names == ["Euclidean, plug-in", "Manhattan, plug-in"]
    assert [line.get_ydata().tolist() for line in several.lines] == [[7.0], [9.0]]
    assert len({line.get_color() for line in several.lines}) == 2
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def test_panels_have_the_axes_that_their_quantities_need(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    # A constant batch, and a learning rate that ends at 0.
    steps = range(1, 101)
    curves = {
        "batch_size": curve(*((step, 16) for step in steps)),
        "lr": curve(*((step, 0.1 * (1 - step / 100)) for step in steps)),
        "train_loss": curve(*((step, 2.0 + step % 2) for step in steps)),
    }
    panels = ["batch_size", "lr", "train_loss"]
    draw({"a": [curves]}, [tmp_path / "a.png"], panels=panels, smooth=0.5, size="column")
    batch, lr, loss = figures[0].axes
    assert batch.get_ylim()[0] == 0.0
    assert lr.get_yscale() == "log"
    assert lr.get_ylim()[0] > 1e-4
    faint, smoothed = loss.lines
    assert faint.get_alpha() < 0.5
    assert smoothed.get_ydata()[30:70] == pytest.approx([2.5] * 40, abs=0.02)
    assert [text.get_text() for text in loss.get_legend().texts] == [
        "mean over 50 % of the run",
        "each step",
    ]
    assert figures[0].get_size_inches()[0] == 3.25
    monkeypatch.undo()
    pyplot.close(figures[0])


def test_lines_can_be_told_apart_without_color_and_the_papers_has_ours(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    groups = {name: [{"loss": curve((1, 5), (9, 3))}] for name in ("a", "a, paper", "b", "c")}
    draw(groups, [tmp_path / "a.png"], panels=["loss"], partners={"a, paper": "a"})
    ours, papers, *others = figures[0].axes[0].lines
    assert ours.get_color() == papers.get_color()
    styles = [line._dash_pattern for line in figures[0].axes[0].lines]
    assert len({str(style) for style in styles}) == 4
    assert len({line.get_color() for line in (ours, *others)}) == 3
    monkeypatch.undo()
    pyplot.close(figures[0])


def test_the_axis_of_a_loss_fits_what_comes_after_the_first_steps(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    # Over 100 steps, of which the first 15 % reach a loss of 3; the last is 2.
    runs = {"a": [{"loss": curve((0, 12), (10, 8), (15, 3), (100, 2))}]}
    draw(runs, [tmp_path / "a.png"], panels=["loss"])
    draw(runs, [tmp_path / "a.png"], panels=["loss"], focus=0.0)
    (low, high), (_, highest) = (figure.axes[0].get_ylim() for figure in figures)
    assert 1.8 < low < 2.0
    assert 3.0 < high < 3.2
    assert highest > 12.0
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


@pytest.mark.parametrize("number", [1, 4, 9])
def test_the_legend_stays_within_the_figure_however_long_the_names(number, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    runs = {
        f"table2-signum_adaptive-demo-batch_size.theta={n}": [{"loss": curve((1, 2), (2, 1))}]
        for n in range(number)
    }
    draw(runs, [tmp_path / "a.png"], panels=["loss"])
    (figure,) = figures
    legend = figure.legends[-1].get_window_extent()
    assert len(figure.legends) == 1
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    monkeypatch.undo()
    pyplot.close(figure)


def test_what_cannot_be_drawn_is_reported_in_one_line(tmp_path, run):
    pytest.importorskip("matplotlib")
    groups = {"mine": [{"lr": curve((1, 2))}]}
    with pytest.raises(InputError, match="none of the runs has the panel loss; they have lr"):
        draw(groups, [tmp_path / "a.png"], panels=["loss"])
    with pytest.raises(InputError, match="there is no panel speed; use some of perplexity"):
        draw(groups, [tmp_path / "a.png"], panels=["speed"])
    with pytest.raises(InputError, match="nothing to draw"):
        draw({"mine": [{}]}, [tmp_path / "a.png"])
    with pytest.raises(InputError, match=r"a.word cannot be written"):
        draw(groups, [tmp_path / "a.word"])


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'gns-pretrain\[figures\]'"):
        draw({"mine": [{"lr": curve((1, 2))}]}, [tmp_path / "a.png"], panels=["lr"])


def call(monkeypatch, capsys, *arguments):
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["plot_runs.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "scripts" / "plot_runs.py"), run_name="__main__")
    return exit_.value.code, capsys.readouterr()


def test_the_command_draws_runs_and_published_curves_side_by_side(
    run, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    published = write_curve(tmp_path / "a.csv", [(1, 9.0), (5, 4.0)], tokens=[64, 96])
    out = tmp_path / "a.png"
    code, printed = call(
        monkeypatch, capsys, run, f"them={published}", "--x=tokens", f"--out={out}", "--json"
    )
    assert code == 0
    assert json.loads(printed.out) == {
        "out": [str(out)],
        "axis": "tokens",
        "panels": ["perplexity", "batch_size", "noise_scale", "lr"],
        "runs": {"table2-signum_adaptive-demo": [str(run)], "them": [str(published)]},
    }
    assert out.is_file()
    code, printed = call(monkeypatch, capsys, tmp_path / "missing", f"--out={out}")
    assert code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_the_x_axis_is_tokens_where_steps_differ_and_every_run_has_them(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    rows = {"a": [(1, 9.0), (5, 4.0)], "b": [(1, 9.0), (7, 4.0)], "c": [(1, 9.0), (7, 5.0)]}
    paths = {
        name: write_curve(tmp_path / f"{name}.csv", rows[name], tokens=[64, 96]) for name in rows
    }
    bare = write_curve(tmp_path / "bare.csv", rows["a"])
    axes = []
    for chosen in ([paths["a"], paths["b"]], [paths["b"], paths["c"]], [paths["b"], bare]):
        _, printed = call(monkeypatch, capsys, *chosen, f"--out={tmp_path}/a.png", "--json")
        axes.append(json.loads(printed.out)["axis"])
    assert axes == ["tokens", "step", "step"]


def test_the_papers_curves_stand_beside_the_runs_of_their_cells(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    runs = [
        write_run(tmp_path, "table2", f"signum_{role}", [(1, 5.0), (9, 4.0)], seed=seed)
        for role in ("small", "adaptive")
        for seed in (0, 1)
    ]
    published = write_curve(tmp_path / "paper" / "figure2" / "signum_64.csv", [(1, 9.0), (5, 4.0)])
    options = [f"--out={tmp_path}/a.png", "--json", f"--paper={tmp_path}/paper"]
    _, printed = call(monkeypatch, capsys, *runs, *options)
    drawn = {label: len(paths) for label, paths in json.loads(printed.out)["runs"].items()}
    assert drawn == {"small": 2, "small, paper": 1, "adaptive": 2}
    assert "note: small is of scale demo, the paper's curve of paper" in printed.err
    published.unlink()
    code, printed = call(monkeypatch, capsys, *runs, *options)
    assert code == 2
    assert printed.err.count("\n") == 1
    assert "signum_64.csv" in printed.err


def test_the_papers_figures_are_drawn_from_the_published_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    if not REFERENCE.is_dir():
        pytest.skip("needs the published curves; GNS_REFERENCE names their folder")
    panels = {"figure1": 3, "figure2": 1, "signsgd_160m": 4}
    for folder, count in panels.items():
        out = tmp_path / f"{folder}.pdf"
        code, printed = call(monkeypatch, capsys, REFERENCE / folder, f"--out={out}", "--json")
        assert code == 0
        assert len(json.loads(printed.out)["panels"]) == count
