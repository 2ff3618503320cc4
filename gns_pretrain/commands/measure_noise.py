"""Measure the gradient noise scale of a checkpoint without training it.

    gns-pretrain measure-noise --checkpoint outputs/RUN/checkpoints/step_00000488 \\
        --data data/c4 --num-sequences 64 --micro-batch-size 4

--data embedded measures a run on the embedded text, as `gns-pretrain train` makes it by default.
The first N sequences of the validation split, in file order, are one batch, cut into samples of
--micro-batch-size sequences. Also: torchrun --nproc-per-node 2 -m gns_pretrain measure-noise ...
"""

import json
import sys

from rich.table import Table

from gns_pretrain.fields import add_options, from_options, script_parser
from gns_pretrain.launch.measure_noise import MeasurementRequest, Report, measure
from gns_pretrain.system.terminal import Console, write


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser, MeasurementRequest)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    report = measure(from_options(MeasurementRequest, options))
    if report is None:
        return
    for note in report.notes:
        write(f"note: {note}", file=sys.stderr)
    if options.json:
        write(json.dumps(report.as_dict(), allow_nan=False))
    else:
        Console(soft_wrap=True).print(table_of(report))


def table_of(report: Report) -> Table:
    """Format one row for each geometry and estimate."""
    table = Table(title=f"{report.num_samples} samples, batch of {report.batch_size} sequences")
    for column in ("geometry", "estimate"):
        table.add_column(column)
    for column in ("noise", "signal", "noise scale (sequences)", "standard error"):
        table.add_column(column, justify="right")
    for m, standard_error in report.estimated:
        scale = "no signal" if m.noise_scale is None else f"{m.noise_scale:.2f}"
        error = "-" if standard_error is None else f"{standard_error:.2f}"
        table.add_row(m.geometry, m.estimate, f"{m.noise:.4e}", f"{m.signal:.4e}", scale, error)
    return table
