"""Print a table of the paper from run records, beside its values where they are comparable.

    gns-pretrain make-table table2 outputs
    gns-pretrain make-table table2 outputs --scale demo --where batch_size.estimate=plug_in
    gns-pretrain make-table table8 --wandb entity/project --format markdown
    gns-pretrain make-table table2 signum_small=signum_64.csv signum_adaptive=signum_gns.csv

A run belongs where its config.yaml says: table, cell, seed, scale.name. Folders are searched at
any depth. Published curves are given cell by cell; several of one cell, or a folder of them, are
its seeds.
"""

import sys

from gns_pretrain.fields import script_parser
from gns_pretrain.results.layouts import LAYOUTS
from gns_pretrain.results.render import FORMATS
from gns_pretrain.results.tables import make_table
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("table", choices=LAYOUTS, help="which one")
    option(
        "sources",
        nargs="*",
        metavar="FOLDER|CELL=PATH",
        help="run directories or folders of them; a CSV or a folder of CSVs for a cell",
    )
    option("--scale", help="the scale to take, where the runs have several")
    option(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this setting of their config.yaml, as batch_size.theta=0.6; "
        "repeatable. Runs that do not use it (a constant batch) stay",
    )
    option("--hours", action="store_true", help="add columns of wall time; of run directories")
    option("--wandb", metavar="ENTITY/PROJECT", help="read W&B instead of folders")
    option("--format", choices=FORMATS, default="text", help="default: text")
    option(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    given = parser.parse_intermixed_args()
    table = make_table(
        given.table,
        given.sources,
        scale=given.scale,
        where=given.where,
        project=given.wandb,
        hours=given.hours,
    )
    write(FORMATS[given.format](table).removesuffix("\n"))
    if given.format == "csv" and table.notes:  # has no place for them
        write(*table.notes, file=sys.stderr)
