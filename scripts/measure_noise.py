"""Measure the gradient noise scale of a checkpoint without training it.

    python scripts/measure_noise.py --checkpoint outputs/RUN/checkpoints/step_00000488 \\
        --data data/c4 --num-sequences 64 --micro-batch-size 4 --sequence-length 128

The first N sequences of the validation split, in file order, are one batch, cut into samples of
--micro-batch-size sequences. Also: torchrun --nproc-per-node 2 scripts/measure_noise.py ...
"""

import argparse
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import MODES
from gns_pretrain.launch.measure_noise import MeasurementRequest, Report, measure
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.settings import NUCLEAR_PARAMETERS, PARAMETERS


def main() -> int:
    """Exit code 0: measured; 2: bad input."""
    arguments = vars(_parser().parse_args())
    as_json = arguments.pop("json")
    try:
        report = measure(MeasurementRequest(**arguments))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if report is None:
        return 0
    for note in report.notes:
        sys.stderr.write(f"note: {note}\n")
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), allow_nan=False) + "\n")
    else:
        Console(soft_wrap=True).print(_table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = {f.name: f.default for f in fields(MeasurementRequest)}

    def add(flag: str, about: str, name: str | None = None, **options: Any) -> None:
        name = name or flag.removeprefix("--").replace("-", "_")
        value = default[name]
        told = f" (default: {value})" if value is not MISSING else ""
        parser.add_argument(
            flag, dest=name, help=about + told, default=argparse.SUPPRESS, **options
        )

    add("--checkpoint", "a step_* folder or a Hugging Face Llama folder", type=Path, required=True)
    add("--data", "folder of token shards with a validation split", type=Path, required=True)
    add("--num-sequences", "the batch, in sequences", type=int, required=True)
    add("--micro-batch-size", "sequences of a sample", type=int, required=True)
    add("--sequence-length", "tokens of a sequence", type=int)
    geometries = list(GEOMETRIES)
    add("--geometry", "default: all three", "geometries", nargs="+", choices=geometries)
    estimates = GEOMETRIES["manhattan"].estimates
    add("--estimate", "default: plug_in", "estimates", nargs="+", choices=estimates)
    add("--parameters", "that Euclidean and Manhattan look at", choices=PARAMETERS)
    add("--nuclear-parameters", "that Nuclear looks at", choices=NUCLEAR_PARAMETERS)
    add("--square-root", "how tr C^(1/2) is taken", choices=MODES)
    add("--interval", "standard errors by a jackknife", action=argparse.BooleanOptionalAction)
    add("--device", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _table(report: Report) -> Table:
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
    sys.exit(main())
