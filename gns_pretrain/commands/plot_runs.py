"""Draw runs as the paper's Figures 1 to 3: perplexity, batch size, noise scale, learning rate.

    gns-pretrain plot-runs outputs/table2-signum_* --out signum.png --out signum.pdf
    gns-pretrain plot-runs 'B = 64=figure2/signum_64.csv' adaptive=figure2/signum_gns.csv \\
        mine=outputs/table2-signum_adaptive-paper-seed0 --x tokens --out compare.pdf

Run directories, folders of them, and published CSVs or W&B exports. Runs whose names differ in
the seed alone are one line with a band (mean and sample standard deviation over the seeds that are
there; a tick where one ends before the others); a label=PATH joins whatever has the same label.
"""

import json
import sys
from pathlib import Path

from gns_pretrain.errors import DamagedFileError
from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.results.figures import AXIS_LABELS, PANELS, Curves, draw, notes_on_ends
from gns_pretrain.results.frame import grouped, lines_beside, named_noise, read_curves
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option(
        "runs", nargs="+", metavar="PATH|LABEL=PATH", help="run directory, folder of them, or CSV"
    )
    option(
        "--out",
        type=path_argument,
        action="append",
        required=True,
        help="file.png or file.pdf; repeatable",
    )
    option("--x", choices=AXIS_LABELS, default="step", help="x-axis (default: step)")
    option(
        "--panels", help=f"of {','.join(PANELS)} (default: the paper's four, where runs have them)"
    )
    option(
        "--noise",
        metavar="GEOMETRY/ESTIMATE",
        help="whose noise scale, as manhattan/plug_in (default: the one that chose the batch)",
    )
    option("--each-seed", action="store_true", help="a line for every seed, instead of a band")
    option(
        "--focus",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="the y-axis of a loss fits what comes after this share of a run (default: 0.15, "
        "the paper's warm-up); 0 shows all",
    )
    option("--title", help="over the figure")
    option("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args()
    noise = given.noise and named_noise(given.noise)
    groups: dict[str, dict[Path, Curves]] = {}
    damaged = []
    for label, paths in grouped(given.runs).items():
        for path in paths:
            try:
                read = read_curves(path, axis=given.x, noise=noise)
                groups.setdefault(label, {})[path] = read
            except DamagedFileError as error:
                damaged.append(error)
    write(*lines_beside(groups, damaged), file=sys.stderr)
    curves = {label: list(runs.values()) for label, runs in groups.items()}
    panels = draw(
        curves,
        given.out,
        panels=given.panels and given.panels.split(","),
        axis=given.x,
        each_seed=given.each_seed,
        title=given.title,
        focus=given.focus,
    )
    if not given.each_seed:
        for note in notes_on_ends(curves, panels, given.x):
            write(f"note: {note}", file=sys.stderr)
    drawn = {
        "out": [str(path) for path in given.out],
        "panels": panels,
        "runs": {label: [str(path) for path in paths] for label, paths in groups.items()},
    }
    if given.json:
        write(json.dumps(drawn))
    else:
        seeds = ", ".join(f"{label} ({len(paths)})" for label, paths in groups.items())
        write(f"{', '.join(drawn['out'])}: {', '.join(panels)} of {seeds}")
