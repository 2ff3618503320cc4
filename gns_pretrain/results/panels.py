"""What a figure of runs can show, one set of axes each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gns_pretrain.errors import InputError
from gns_pretrain.results.bands import Values
from gns_pretrain.results.curves import Curve

Run = Mapping[str, Curve]  # by quantity, as read_curves gives them


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Args:
        label: of the y-axis, with its unit.
        quantity: that it shows.
        transform: of its values, after seeds were brought onto one grid.
        log: scale of the y-axis.
        stepwise: it stays until it changes: neither it nor its average is sloped between points.
        falls: steeply at first, so that the y-axis fits what comes after.
        behind: a quantity drawn faintly behind it.
    """

    label: str
    quantity: str
    transform: Callable[[Values], Values] = np.asarray
    log: bool = False
    stepwise: bool = False
    falls: bool = False
    behind: str | None = None


PANELS = {
    "perplexity": Panel("validation perplexity", "loss", transform=np.exp, log=True, falls=True),
    "loss": Panel("validation loss (nats per token)", "loss", falls=True),
    "losses": Panel("loss (nats per token)", "loss", behind="train_loss"),
    "train_loss": Panel("training loss (nats per token)", "train_loss", falls=True),
    "batch_size": Panel("batch size (sequences)", "batch_size", stepwise=True),
    "noise_scale": Panel("noise scale, average (sequences)", "noise_scale"),
    "lr": Panel("learning rate", "lr"),
}


def chosen_panels(groups: Mapping[str, Sequence[Run]], panels: Sequence[str] | None) -> list[str]:
    """Names of those to draw.

    Args:
        groups: runs by label.
        panels: names of PANELS; None takes the paper's, as far as the runs have them.

    Raises:
        InputError: there is no such panel, or no run has what it shows.
    """
    known = {quantity for runs in groups.values() for run in runs for quantity in run}
    if panels is None:
        paper = ("perplexity", "batch_size", "noise_scale", "lr")
        names = [name for name in paper if PANELS[name].quantity in known]
        if not names:
            raise InputError("the runs hold nothing to draw; name finished or running runs")
        return names
    for name in panels:
        if name not in PANELS:
            raise InputError(f"there is no panel {name}; use some of {', '.join(PANELS)}")
        if PANELS[name].quantity not in known:
            raise InputError(
                f"none of the runs has the panel {name}; they have {', '.join(sorted(known))}"
            )
    return list(panels)
