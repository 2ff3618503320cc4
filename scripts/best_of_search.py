"""What searches over settings (the sweeps tune_*) found, the best point of each first.

    python scripts/best_of_search.py outputs
    python scripts/best_of_search.py outputs --format markdown

Under each search stand the best point's numbers as conf/scale/<scale>.yaml takes them, and which of
them lie at an end of what was tried, where the search should go on.
"""

import argparse
import sys
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.results.search import FORMATS, searches
from gns_pretrain.results.tables.selection import runs_of_folders


def main() -> int:
    """Exit code 0: told; 2: bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run directories or folders of them")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    arguments = parser.parse_args()
    try:
        found = searches(runs_of_folders(arguments.folders))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write("\n".join(FORMATS[arguments.format](search) for search in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
