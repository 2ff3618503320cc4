"""Show the state of the runs in a folder.

    gns-pretrain status                      a table of the runs in outputs/
    gns-pretrain status FOLDER --watch       of others, refreshed until Ctrl-C
    gns-pretrain status FOLDER --json        one JSON array

The folder of a run, or one that holds some; with SLURM, runs that wait for their first start are
listed too. Shown are the share of the token budget that is done, the losses of the last step and
of the last evaluation (nats a token), the batch (sequences), and when the run has ended or will.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Group
from rich.live import Live

from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.launch.status import status_view, statuses
from gns_pretrain.system.slurm import job_states
from gns_pretrain.system.terminal import Console, write

WIDTH = 160  # of a table that is not shown on a terminal


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        type=path_argument,
        default=Path("outputs"),
        help="the folder of a run, or one that holds some (outputs)",
    )
    parser.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between refreshes (5)")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead")
    arguments = parser.parse_args()
    if arguments.watch:
        with (
            Live(view(arguments.folder), console=Console(), auto_refresh=False) as live,
            suppress(KeyboardInterrupt),
        ):
            while True:
                time.sleep(arguments.every)
                live.update(view(arguments.folder), refresh=True)
    elif arguments.json:
        runs = [asdict(run) for run in statuses(arguments.folder, job_states())]
        write(json.dumps(runs, indent=1))
    else:
        width = None if sys.stdout.isatty() else WIDTH
        Console(width=width).print(view(arguments.folder))


def view(folder: Path) -> Group:
    return status_view(statuses(folder, job_states()))
