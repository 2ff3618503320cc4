"""What searches over settings (the sweeps tune_*) found, the best point of each first.

    gns-pretrain best-of-search outputs
    gns-pretrain best-of-search outputs --format markdown

Under each search stand the best point's numbers as conf/scale/<scale>/<workload>.yaml takes them,
and which of them lie at an end of what was tried, where the search should go on.
"""

import sys

from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.results.frame import runs_of_folders
from gns_pretrain.results.search import FORMATS, searches
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("folders", nargs="+", type=path_argument, help="run directories or folders of them")
    option("--format", choices=FORMATS, default="text", help="default: text")
    given = parser.parse_args()
    runs, damaged = runs_of_folders(given.folders)
    write(*damaged, file=sys.stderr)
    found = searches(runs)
    write("\n".join(FORMATS[given.format](search) for search in found).removesuffix("\n"))
