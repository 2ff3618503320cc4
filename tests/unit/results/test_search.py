"""What a search found, from hand-made run records."""

import runpy
import sys
from pathlib import Path

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.results.frame import runs_of_folders
from gns_pretrain.results.search import FORMATS, searches
from tests.unit.run_records import write_run

SCRIPT = Path(__file__).parents[3] / "scripts" / "best_of_search.py"


def point(outputs, optimizer, losses, *, seed=0, **settings):
    """A run of a search, evaluated every 10 steps."""
    evaluations = [(10 * (number + 1), loss) for number, loss in enumerate(losses)]
    name = f"{optimizer}-{seed}-" + "-".join(f"{key}={settings[key]}" for key in settings)
    finished = settings.pop("finished", True)
    write_run(
        outputs,
        "tune",
        optimizer,
        evaluations,
        seed=seed,
        name=name,
        finished=finished,
        batch_size__policy="constant",
        **{f"optimizer__{key}": value for key, value in settings.items()},
    )


def found(outputs):
    return searches(runs_of_folders([outputs])[0])


@pytest.fixture
def signum(tmp_path):
    """Three learning rates; the best is the middle one, by its lowest loss and not its last."""
    point(tmp_path, "signum", [5.0, 4.5], lr=1e-3, momentum=0.9)
    point(tmp_path, "signum", [4.0, 4.8], lr=2e-3, momentum=0.9)
    point(tmp_path, "signum", [4.2, 4.1], lr=4e-3, momentum=0.9)
    return tmp_path


def test_points_are_sorted_by_their_lowest_loss(signum):
    (search,) = found(signum)
    assert (search.optimizer, search.scale) == ("signum", "demo")
    assert search.searched == ["optimizer.lr"]
    assert list(search.points["optimizer.lr"]) == [2e-3, 4e-3, 1e-3]
    assert list(search.points["score"]) == [4.0, 4.1, 4.5]
    assert search.for_the_scale == {"lr": 2e-3, "momentum": 0.9}
    assert search.at_an_end == []


def test_a_best_value_at_an_end_of_what_was_tried_is_reported(signum):
    point(signum, "signum", [3.9], lr=8e-3, momentum=0.9)
    (search,) = found(signum)
    assert search.at_an_end == ["optimizer.lr=0.008 is the largest that was tried"]
    assert "optimizer.lr=0.008 is the largest that was tried" in FORMATS["text"](search)


def test_seeds_of_a_point_are_averaged(signum):
    point(signum, "signum", [4.6], seed=1, lr=2e-3, momentum=0.9)
    (search,) = found(signum)
    assert list(search.points["score"]) == [4.1, 4.3, 4.5]
    assert "| 0.002 | 4.3000 ± 0.4243 |" in FORMATS["markdown"](search)


def test_optimizers_and_their_own_numbers_are_kept_apart(signum):
    point(signum, "muon", [4.0], lr=2e-2, momentum=0.95, adamw__lr=3e-3)
    muon, signum_search = found(signum)
    assert (muon.optimizer, signum_search.optimizer) == ("muon", "signum")
    assert muon.for_the_scale == {"lr": 2e-2, "momentum": 0.95, "adamw_lr": 3e-3}
    assert muon.searched == []


def test_a_run_that_is_not_finished_does_not_count_and_is_reported(signum):
    point(signum, "signum", [1.0], lr=9e-3, momentum=0.9, finished=False)
    (search,) = found(signum)
    assert search.points["score"].iloc[0] == 4.0
    assert "not counted, unfinished: 1 run" in FORMATS["text"](search)


def test_runs_of_no_search_are_refused_in_one_line(tmp_path):
    write_run(tmp_path, "table2", "signum_small", [(10, 4.0)])
    with pytest.raises(InputError, match=r"none of 1 run belongs to a search; start one with"):
        found(tmp_path)


def test_a_search_without_a_finished_run_is_refused(tmp_path):
    point(tmp_path, "signum", [1.0], lr=9e-3, momentum=0.9, finished=False)
    with pytest.raises(InputError, match="no run of signum's search at scale=demo is finished"):
        found(tmp_path)


def test_script_prints_the_best_point_first(signum, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(signum)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert printed.index("0.002") < printed.index("0.004") < printed.index("0.001")
    assert "for conf/scale/demo/language.yaml: scale.signum: {lr: 0.002, momentum: 0.9}" in printed
