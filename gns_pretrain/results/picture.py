"""Loss, noise scale, batch size and learning rate of a few runs, in one picture."""

from pathlib import Path
from typing import Any

from gns_pretrain.results.runs import RunRecord

# (title, unit on the y-axis, [(kind of line, key, line style)])
PANELS = (
    ("loss", "nats per token", [("train", "loss", "faint"), ("validation", "loss", "marked")]),
    ("noise scale (average)", "sequences", [("noise", "noise_scale_ema", "plain")]),
    ("batch size", "sequences", [("train", "batch_size", "plain")]),
    ("learning rate", "", [("train", "lr", "plain")]),
)
STYLES: dict[str, dict[str, Any]] = {
    "faint": {"alpha": 0.25, "linewidth": 0.8},
    "marked": {"marker": "o", "markersize": 4, "linewidth": 1.5},
    "plain": {"linewidth": 1.5},
}


def draw_runs(runs: dict[str, RunRecord], path: Path) -> None:
    """Draw runs over optimizer steps and save the picture.

    Args:
        runs: by the label that the legend shows.
        path: of the PNG or PDF; its ending decides.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (title, unit, lines) in zip(axes.flat, PANELS, strict=True):
        for number, (label, run) in enumerate(runs.items()):
            for kind, key, style in lines:
                steps, values = run.curve(kind, key)
                # Only the strongest line of a panel is named.
                name = label if style != "faint" and steps else None
                axis.plot(steps, values, color=f"C{number}", label=name, **STYLES[style])
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
