"""The demo of `make train`: an adaptive batch against a constant one, on the same token budget.

    gns-pretrain demo                      both runs, a table and a picture
    gns-pretrain demo seed=1               settings for both, as for `gns-pretrain train`

Restarted, it resumes; finished runs are not trained twice.
"""

import subprocess
import sys
from pathlib import Path

from rich.table import Table

from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_home
from gns_pretrain.results.figures import draw
from gns_pretrain.results.frame import hours_of, read_curves
from gns_pretrain.runs.directory import read_summary
from gns_pretrain.system.processes import python_command, python_environment
from gns_pretrain.system.terminal import Console

RUNS = {"adaptive batch": "adaptive", "constant batch": "constant"}


def main() -> None:
    settings = sys.argv[1:]
    if {"-h", "--help"} & set(settings):
        sys.stdout.write(__doc__ or "")
        return
    if "resume=never" in settings:
        raise InputError(
            "resume=never would train into folders that the table does not show; "
            "use another output_directory=..."
        )
    given = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    outputs, seed = Path(at_home(given.get("output_directory", "outputs"))), given.get("seed", "0")
    for label, experiment in RUNS.items():
        words = ["train", f"+experiment=demo/{experiment}"]
        Console(soft_wrap=True).print(f"\n{label}: gns-pretrain {' '.join(words)}")
        name = f"run_name=demo-{experiment}-seed{seed}"
        command = python_command("gns_pretrain", *words, name, *settings)
        code = subprocess.run(command, env=python_environment(), check=False).returncode
        if code:
            sys.exit(code)
    picture = outputs / f"demo-seed{seed}.png"
    runs = {label: outputs / f"demo-{experiment}-seed{seed}" for label, experiment in RUNS.items()}
    curves = {label: [read_curves(run)] for label, run in runs.items()}
    draw(curves, [picture], panels=("losses", "noise_scale", "batch_size", "lr"))
    console = Console(soft_wrap=True)
    console.print(closing_table(runs))
    console.print(f"picture: {picture}")


def closing_table(runs: dict[str, Path]) -> Table:
    """Compare steps, tokens, loss and time of the runs, whole and to a loss that both reach."""
    losses = {label: read_curves(run)["loss"] for label, run in runs.items()}
    target = max(curve.min() for curve in losses.values())
    table = Table(title="the same tokens, taken in batches of different size")
    table.add_column("", no_wrap=True)
    headers = ("steps", "tokens", "last batch", "val. loss", "tokens/s", "training\n(s)")
    for column in (*headers, f"to a loss of\n{target:.4f} (s)"):
        table.add_column(column, justify="right")
    for label, run in runs.items():
        reached = losses[label].index[losses[label] <= target][0]
        seconds = 3600 * hours_of(str(run)).loc[:reached].iloc[-1]
        summary = read_summary(run)
        formats = {"steps": ",", "tokens": ",", "batch_size": ",", "validation_loss": ".4f"}
        formats |= {"tokens_per_second": ",.0f", "seconds": ".0f"}
        numbers = [format(summary[name], how) for name, how in formats.items()]
        table.add_row(label, *numbers, f"{seconds:.0f}")
    return table
