"""Put runs on one page to explore in a browser: a table, curves, and settings side by side.

    gns-pretrain report outputs --out report.html
    gns-pretrain report outputs/c4-* paper=figure2/signum_gns.csv --out report.html

Run directories, finished or not, folders of them, and published CSVs or W&B exports. Runs whose
names differ in the seed alone, or that have the same label=PATH, have one color. The page holds all
that it needs (5 MB) and works without a network: it can be mailed, or put into a repository.
"""

import json
import sys
import time
from pathlib import Path

from gns_pretrain.errors import counted
from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.launch.status import run_status
from gns_pretrain.results.labels import grouped
from gns_pretrain.results.report import report
from gns_pretrain.system.files import must_write, write_bytes
from gns_pretrain.system.slurm import job_states
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option(
        "runs", nargs="+", metavar="PATH|LABEL=PATH", help="run directory, folder of them, or CSV"
    )
    option("--out", type=path_argument, default=Path("report.html"), help="default: report.html")
    option("--title", default="Training runs", help="of the page")
    option("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args()
    groups = grouped(given.runs)
    queue, now = job_states(), time.time()

    def outcome(directory: Path) -> tuple[str, str]:
        status = run_status(directory, queue, None, now=now)
        return status.state, status.error

    page, damaged = report(groups, title=given.title, outcome=outcome)
    write(*damaged, file=sys.stderr)
    with must_write(given.out, hint="name a file in a folder that exists"):
        write_bytes(given.out, page.encode())
    runs = sum(map(len, groups.values())) - len(damaged)
    if given.json:
        write(json.dumps({"out": str(given.out), "runs": runs, "left_out": damaged}))
    else:
        write(
            f"{given.out}: {counted(runs, 'run')}, {len(page) / 1e6:.1f} MB; open it in a browser"
        )
