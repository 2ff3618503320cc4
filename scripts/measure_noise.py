"""Measure the gradient noise scale of a checkpoint without training it.

    python scripts/measure_noise.py --checkpoint outputs/RUN/checkpoints/step_00000488 \\
        --data data/c4 --num-sequences 64 --micro-batch-size 4 --sequence-length 128

The first N sequences of the validation split, in file order, are one batch, cut into samples of
--micro-batch-size sequences. Also: torchrun --nproc-per-node 2 scripts/measure_noise.py ...
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from gns_pretrain.errors import InputError, print_error
from gns_pretrain.fields import add_options, from_options
from gns_pretrain.launch.measure_noise import MeasurementRequest, Report, measure
from gns_pretrain.system.process_exit import rank_process


def main() -> int:
    """Exit code 0: measured; 2: bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, MeasurementRequest)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    try:
        report = measure(from_options(MeasurementRequest, options))
    except InputError as error:
        return print_error(error)
    if report is None:
        return 0
    for note in report.notes:
        sys.stderr.write(f"note: {note}\n")
    if options.json:
        sys.stdout.write(json.dumps(report.as_dict(), allow_nan=False) + "\n")
    else:
        Console(soft_wrap=True).print(table_of(report))
    return 0


def table_of(report: Report) -> Table:
    """Format one row for each geometry and estimate."""
    table = Table(title=f"{report.num_samples} samples, batch of {report.batch_size} sequences")
    for column in ("geometry", "estimate"):
        table.add_column(column)
    for column in ("noise", "signal", "noise scale (sequences)", "standard error"):
        table.add_column(column, justify="right")
    for entry in report.estimated:
        m = entry.measurement
        scale = "no signal" if m.noise_scale is None else f"{m.noise_scale:.2f}"
        error = "-" if entry.standard_error is None else f"{entry.standard_error:.2f}"
        table.add_row(m.geometry, m.estimate, f"{m.noise:.4e}", f"{m.signal:.4e}", scale, error)
    return table


if __name__ == "__main__":
    with rank_process():
        sys.exit(main())
