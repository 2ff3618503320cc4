"""The page of `gns-pretrain report`: what it holds, and what a real browser makes of it."""

import json
import re
import sys

import pytest

from gns_pretrain.commands import report as command
from gns_pretrain.errors import DamagedFileError
from gns_pretrain.results.labels import grouped, without_common_parts
from gns_pretrain.results.report import report
from tests import browser
from tests.unit.run_records import write_curve, write_run

pytest.importorskip("plotly")
HOSTILE = "</script><img src=x onerror=alert(1)><b>&"


def write_lines(directory, *, steps, loss, why="rounded down to a multiple of 4"):
    """A record of 16 sequences a step, from its third step on of 32, and two noise scales."""
    lines, tokens = [], 0
    for step in range(1, steps + 1):
        size = 32 if step >= 3 else 16
        tokens += 128 * size
        train = {"loss": loss + 1 / step, "lr": 0.1 / step, "grad_norm": 1.0, "batch_size": size}
        train |= {"step_seconds": 0.5, "tokens_per_second": 256.0 * size}
        if step == 3:
            change = {"from": 16, "to": 32, "target": 33.5, "lr_multiplier": 1.41, "why": why}
            lines.append({"kind": "batch_size", "step": step} | change)
        lines.append({"kind": "train", "step": step, "tokens": tokens} | train)
        noise = {"kind": "noise", "step": step, "estimate": "plug_in", "noise_scale": 9.0}
        for geometry, scale in (("manhattan", 40.0), ("nuclear", 60.0)):
            lines.append(noise | {"geometry": geometry, "noise_scale_ema": scale})
        lines.append({"kind": "validation", "step": step, "tokens": tokens, "loss": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def outputs(tmp_path):
    """Three runs, of which one has not finished and has a name that is HTML."""
    folder = tmp_path / "outputs"
    for name, lr, loss in (("demo-fast", 0.5, 3.0), ("demo-slow", 0.1, 4.0)):
        write_lines(
            write_run(folder, None, "a", [(1, 1.0)], name=name, optimizer__lr=lr),
            steps=4,
            loss=loss,
        )
    hostile = write_run(folder, None, HOSTILE, [(1, 1.0)], name="demo-hostile", finished=False)
    hostile = hostile.rename(hostile.with_name(HOSTILE.replace("/", "\u2215")))
    write_lines(hostile, steps=6, loss=3.5, why=HOSTILE)
    return folder


def page_of(*paths, title="Runs"):
    return report(
        grouped(list(map(str, paths))), title=title, outcome=lambda path: ("finished", "")
    )


def content_of(page):
    """The JSON in a page."""
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def test_a_report_holds_results_what_differs_and_curves_over_every_axis(outputs):
    page, notes = page_of(outputs / "demo-fast", outputs / "demo-slow")
    content = content_of(page)
    assert notes == []
    assert content["varying"] == ["optimizer.lr"]
    fast, slow = content["runs"]
    assert (fast["short"], slow["short"]) == ("fast", "slow")
    assert fast["results"] == {
        "lowest validation loss": 3,
        "final validation loss": 3,
        "steps": 4,
        "tokens": 128 * 96,
        "final batch": 32,
        "time": 2,
        "speed": 6144,
    }
    assert fast["train"]["seconds"] == [0.5, 1, 1.5, 2]
    assert fast["validation"]["tokens"] == [2048, 4096, 8192, 12288]
    assert fast["batch"]["step"] == [1, 3, 4]
    assert fast["noise"]["nuclear/plug_in"]["noise_scale_ema"] == [60] * 4
    assert fast["followed"] == "manhattan/plug_in"
    assert fast["decisions"]["target"] == [33.5]
    assert fast["decisions"]["why"] == ["rounded down to a multiple of 4"]


def test_published_curves_and_runs_that_have_just_begun_are_shown_with_what_they_have(tmp_path):
    begun = write_run(tmp_path, None, "a", [], finished=False)
    path = write_curve(tmp_path / "a.csv", [(1, 9.0), (5, 4.0)], batch_size=[64, 96], noise=["", 8])
    content = content_of(page_of(begun, path)[0])
    begun, published = content["runs"]
    assert begun["results"]["lowest validation loss"] is None
    assert published["results"]["lowest validation loss"] == 4
    assert published["noise"]["published average"]["gns_ema"] == [8]
    assert "tokens" not in published["validation"]


def test_a_damaged_run_is_left_out_with_a_line_and_hides_no_other(outputs):
    (outputs / "demo-slow" / "metrics.jsonl").write_text("{]\n")
    page, notes = page_of(outputs)
    assert len(content_of(page)["runs"]) == 2
    assert content_of(page)["notes"] == notes
    (note,) = notes
    assert note.startswith("left out: ")
    assert "demo-slow" in note
    with pytest.raises(DamagedFileError, match="demo-slow"):
        page_of(outputs / "demo-slow")


def test_nothing_from_a_run_can_end_the_pages_script_or_add_one(outputs):
    page, _ = page_of(outputs, title=HOSTILE)
    assert page.count("</script>") == 3
    assert "<img" not in page
    hostile = next(run for run in content_of(page)["runs"] if "img" in run["name"])
    assert hostile["decisions"]["why"] == [HOSTILE]


def test_the_command_writes_the_page_and_names_what_became_of_runs(outputs, monkeypatch, capsys):
    out = outputs / "report.html"
    monkeypatch.setattr(sys, "argv", ["report", str(outputs), f"--out={out}"])
    command.main()
    assert capsys.readouterr().out.startswith(f"{out}: 3 runs, ")
    outcomes = [run["outcome"] for run in content_of(out.read_text())["runs"]]
    assert outcomes == ["failed", "finished", "finished"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["table2-signum_adaptive-demo", "table2-signum_small-demo"], ["adaptive", "small"]),
        (["demo-adaptive", "demo-constant"], ["adaptive", "constant"]),
        (
            ["a-optimizer.lr=1e-3", "a-optimizer.lr=1e-2"],
            ["optimizer.lr=1e-3", "optimizer.lr=1e-2"],
        ),
        (["c4", "c4-batch_size.theta=0.6"], ["c4", "c4-batch_size.theta=0.6"]),
        (["a-b", "a-b"], ["a-b", "a-b"]),
        (["one"], ["one"]),
        (["a-b", "a_b"], ["a-b", "a_b"]),
        (["", "-", "a_"], ["", "-", "a_"]),
    ],
)
def test_names_are_cut_to_what_differs(names, expected):
    assert without_common_parts(names) == expected


def test_a_browser_shows_the_runs_without_an_error_or_a_request(outputs, tmp_path):
    if browser.CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    out = tmp_path / "report.html"
    out.write_text(page_of(outputs, title="A title")[0])
    with browser.opened(out.as_uri(), tmp_path / "profile") as page:
        page.wait_for("document.body?.dataset.drawn")
        names = "row => row.cells[0].textContent.trim()"
        rows = page.evaluate(f"[...document.querySelectorAll('#runs tbody tr')].map({names})")
        # Sorted by the lowest validation loss: 3, 3.5 and 4.
        assert rows == ["demo-fast", HOSTILE.replace("/", "\u2215"), "demo-slow"]
        assert page.evaluate("document.querySelectorAll('.panel .main-svg').length") >= 6

        axis_title = "document.querySelector('.plot').layout.xaxis.title.text"
        last_x = "document.querySelector('.plot').data[0].x.at(-1)"
        buttons = "[...document.querySelectorAll('.choice button')]"
        click = f"{buttons}.find(button => button.textContent == '{{}}').click()"
        assert (page.evaluate(axis_title), page.evaluate(last_x)) == ("tokens", 12288)
        page.evaluate(click.format("optimizer steps"))
        assert (page.evaluate(axis_title), page.evaluate(last_x)) == ("optimizer steps", 4)
        page.evaluate(click.format("training time"))
        assert (page.evaluate(axis_title), page.evaluate(last_x)) == ("training time (s)", 2)

        # A part of the x-axis that is chosen in one panel is shown in all.
        page.evaluate(
            "Plotly.relayout(document.querySelector('.plot'), "
            "{'xaxis.range[0]': 0.5, 'xaxis.range[1]': 1.5}).then(() => null)"
        )
        plots = "[...document.querySelectorAll('.plot')]"
        page.wait_for(f"{plots}.every(plot => String(plot.layout.xaxis.range) === '0.5,1.5')")

        lines = "document.querySelector('.plot').data.length"
        assert page.evaluate(lines) == 3
        page.evaluate("document.querySelector('#runs input').click()")
        assert page.evaluate(lines) == 2
        page.evaluate("document.querySelector('#runs th').click()")
        first = "document.querySelector('#runs tbody td').textContent.trim()"
        assert page.evaluate(first).startswith("<")
        settings = "document.querySelector('#settings').textContent"
        assert "optimizer.lr" in page.evaluate(settings)
        assert page.problems() == []
        assert page.requests() == [out.as_uri()]
