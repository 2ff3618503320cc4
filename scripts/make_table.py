"""Print a table of the paper from run records, beside its values where they are comparable.

    python scripts/make_table.py table2 outputs
    python scripts/make_table.py table2 outputs --scale demo --where batch_size.estimate=plug_in
    python scripts/make_table.py table8 --wandb entity/project --format markdown
    python scripts/make_table.py table2 signum_small=signum_64.csv signum_adaptive=signum_gns.csv

A run belongs where its config.yaml says: table, cell, seed, scale.name. Folders are searched at
any depth. Published curves are given cell by cell; several of one cell, or a folder of them, are
its seeds.
"""

import argparse
import sys

from rich.console import Console

from gns_pretrain.errors import InputError
from gns_pretrain.results.tables.layouts import LAYOUTS
from gns_pretrain.results.tables.rendering import FORMATS
from gns_pretrain.results.tables.table import TableRequest, make_table


def main() -> int:
    """Exit code 0: printed; 2: bad input."""
    arguments = _parser().parse_intermixed_args()
    console = Console(stderr=True, soft_wrap=True)
    try:
        table = make_table(
            TableRequest(
                table=arguments.table,
                sources=arguments.sources,
                scale=arguments.scale,
                where=arguments.where,
                project=arguments.wandb,
            )
        )
    except InputError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    sys.stdout.write(FORMATS[arguments.format](table))
    if arguments.format == "csv":  # has no place for them
        for note in table.notes:
            console.print(note, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=LAYOUTS, help="which one")
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="FOLDER|CELL=PATH",
        help="run directories or folders of them; a CSV or a folder of CSVs for a cell",
    )
    parser.add_argument("--scale", help="the scale to take, where the runs have several")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this setting of their config.yaml, as batch_size.theta=0.6; "
        "repeatable. Runs that do not use it (a constant batch) stay",
    )
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read W&B instead of folders")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
