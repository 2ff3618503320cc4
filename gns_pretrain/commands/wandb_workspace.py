"""Save a W&B workspace for a table of the paper: its cells as groups, losses over tokens first.

    gns-pretrain wandb-workspace table2 team/gns-pretrain

It shows the runs whose configuration says `table: table2`, grouped by `cell`: a line is the mean
over seeds. Each call saves a new workspace, which a team may change as it likes.
"""

from typing import Any

from gns_pretrain.errors import InputError, needs, one_line
from gns_pretrain.fields import script_parser
from gns_pretrain.results.layouts import LAYOUTS
from gns_pretrain.tracking.unit import IMAGES

# Sections and their panels: a title, and the series as W&B has them, or a pattern for several.
SECTIONS = {
    "Losses": {
        "validation loss": "val/loss",
        "training loss": "train/loss",
        "validation perplexity": "val/perplexity",
    },
    "Batch size": {
        "batch size (samples)": "train/batch_size",
        "noise scale, average (samples)": "noise/.*/noise_scale_ema",
        "learning rate": "train/lr",
    },
    "Speed": {
        "tokens per second": "train/tokens_per_second",
        "optimizer steps": "trainer/step",
        "gradient norm": "train/grad_norm",
    },
}
# What stands in their place for runs on images.
OF_IMAGES = {
    "val/perplexity": ("validation accuracy", "val/accuracy"),
    "train/tokens_per_second": ("images per second", "train/samples_per_second"),
}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("table", choices=LAYOUTS, help="which one")
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where its runs are")
    given = parser.parse_args()
    entity, _, project = given.project.partition("/")
    if not (entity and project) or "/" in project:
        raise InputError(f"{given.project} is not a project; write it as team/{given.project}")
    with needs("tracking", "wandb-workspaces is not installed"):
        import wandb

        made = workspace(given.table, entity, project)
    try:
        made.save()  # and prints its URL
    except (wandb.Error, ValueError, OSError) as error:
        raise InputError(
            f"W&B: the workspace cannot be saved in {given.project} ({one_line(error)}); check its "
            "name, the network, and `wandb login`"
        ) from error


def workspace(table: str, entity: str, project: str) -> Any:
    """Build the workspace, which `save()` sends."""
    from wandb_workspaces import expr, workspaces
    from wandb_workspaces.reports.v2 import LinePlot

    unit = LAYOUTS[table].unit
    axis = f"trainer/{unit.name}"

    def panel(title: str, series: str) -> LinePlot:
        if unit is IMAGES:
            title, series = OF_IMAGES.get(series, (title, series))
        given = {"metric_regex": series} if "*" in series else {"y": [series]}
        return LinePlot(title=title, x=axis, title_x=unit.noun, **given)

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"{table}: cells over {unit.noun}",
        sections=[
            workspaces.Section(
                name=name, is_open=True, panels=[panel(*each) for each in panels.items()]
            )
            for name, panels in SECTIONS.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=axis, max_runs=30),
        runset_settings=workspaces.RunsetSettings(
            filters=expr.And(expr.Config("table") == table), groupby=[expr.Config("cell")]
        ),
    )
