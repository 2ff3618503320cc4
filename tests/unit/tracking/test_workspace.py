import re
import sys

import pytest

from gns_pretrain.commands import wandb_workspace
from gns_pretrain.commands.wandb_workspace import SECTIONS, workspace
from gns_pretrain.errors import InputError
from gns_pretrain.tracking.views import axes, series

LINES = [
    {
        "kind": "train",
        "step": 1,
        "samples": 8,
        "tokens": 80,
        "loss": 2.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "batch_size": 8,
        "tokens_per_second": 10.0,
    },
    {"kind": "validation", "step": 1, "tokens": 80, "loss": 2.0},
    {
        "kind": "noise",
        "step": 1,
        "geometry": "nuclear",
        "estimate": "plug_in",
        "noise_scale_ema": 4.0,
    },
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library, for its own code
@pytest.mark.parametrize(
    ("table", "axis"), [("table8", "trainer/tokens"), ("table10", "trainer/samples")]
)
def test_a_workspace_shows_a_tables_cells_over_what_its_runs_count(table, axis):
    pytest.importorskip("wandb_workspaces")
    made = workspace(table, "team", "study")._to_model()
    assert (made.entity, made.project) == ("team", "study")
    section = made.spec.section
    assert section.settings.x_axis == axis
    (runs,) = section.run_sets
    (kept,) = runs.filters["filters"]
    assert (kept["key"]["name"], kept["op"], kept["value"]) == ("table", "=", table)
    assert [(key.section, key.name) for key in runs.grouping] == [("config", "cell.value")]
    panels = [panel for group in section.panel_bank_config.sections for panel in group.panels]
    assert {panel.config.x_axis for panel in panels} == {axis}
    assert panels[0].config.metrics == ["val/loss"]


def test_every_panel_shows_a_series_that_runs_have():
    known = {name for line in LINES for name in axes(line) | series(line)}
    patterns = [pattern for panels in SECTIONS.values() for pattern in panels.values()]
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in known)] == []


def test_a_project_without_its_team_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wandb-workspace", "table2", "study"])
    with pytest.raises(InputError, match="study is not a project; write it as team/study"):
        wandb_workspace.main()
