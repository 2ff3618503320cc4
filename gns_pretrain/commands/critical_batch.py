"""The critical batch, measured by branches of runs, beside the noise scales measured there.

    gns-pretrain train +sweep=critical_batch hydra.sweeper.source=outputs/NAME
    gns-pretrain critical-batch outputs
    gns-pretrain critical-batch outputs --out critical_batch.png --format markdown

For each checkpoint that runs were branched from: the validation loss after the window by batch
size, with its standard error over seeds, and the critical batch by three definitions.
"""

import sys

from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.results.critical_batch import FORMATS, critical_batches, draw
from gns_pretrain.results.frame import runs_of_folders
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("folders", nargs="+", type=path_argument, help="run directories or folders of them")
    option("--format", choices=FORMATS, default="text", help="default: text")
    option(
        "--tolerance",
        type=float,
        default=0.01,
        help="nats a token above the lowest loss that still count as reaching it; default: 0.01",
    )
    option("--out", type=path_argument, help="figure: critical batch and noise scales over tokens")
    given = parser.parse_args()
    runs, damaged = runs_of_folders(given.folders)
    write(*damaged, file=sys.stderr)
    found = critical_batches(runs, tolerance=given.tolerance)
    write(FORMATS[given.format](found).removesuffix("\n"))
    if given.out:
        draw(found, given.out)
