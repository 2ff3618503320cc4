"""Loss, noise scale, batch size and learning rate of a few runs, in one picture."""

from pathlib import Path

from gns_pretrain.results.curves import curves_of_records
from gns_pretrain.results.figures import draw
from gns_pretrain.results.runs import RunRecord


def draw_runs(runs: dict[str, RunRecord], path: Path) -> None:
    """Draw runs over optimizer steps and save the picture.

    Args:
        runs: by the label that the legend shows.
        path: of the PNG or PDF; its ending decides.
    """
    groups = {label: [curves_of_records(run.records)] for label, run in runs.items()}
    draw(groups, [path], panels=("losses", "noise_scale", "batch_size", "lr"))
