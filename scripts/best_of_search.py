"""What searches over settings (the sweeps tune_*) found, the best point of each first.

    python scripts/best_of_search.py outputs
    python scripts/best_of_search.py outputs --format markdown

Under each search stand the best point's numbers as conf/scale/<scale>.yaml takes them, and which of
them lie at an end of what was tried, where the search should go on.
"""

import sys
from pathlib import Path

from gns_pretrain.errors import with_exit_code
from gns_pretrain.fields import script_parser


@with_exit_code
def main() -> None:
    # Imported here, so that without pandas the error is one line.
    from gns_pretrain.results.frame import runs_of_folders
    from gns_pretrain.results.search import FORMATS, searches

    parser = script_parser(__doc__)
    option = parser.add_argument
    option("folders", nargs="+", type=Path, help="run directories or folders of them")
    option("--format", choices=FORMATS, default="text", help="default: text")
    given = parser.parse_args()
    found = searches(runs_of_folders(given.folders))
    sys.stdout.write("\n".join(FORMATS[given.format](search) for search in found))


if __name__ == "__main__":
    sys.exit(main())
