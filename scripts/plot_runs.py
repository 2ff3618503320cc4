"""Draw runs as the paper's Figures 1 to 3: perplexity, batch size, noise scale, learning rate.

    python scripts/plot_runs.py outputs/table2-signum_* --out signum.png --out signum.pdf
    python scripts/plot_runs.py 'B = 64=figure2/signum_64.csv' adaptive=figure2/signum_gns.csv \\
        mine=outputs/table2-signum_adaptive-paper-seed0 --x tokens --out compare.pdf

Run directories, folders of them, and published CSVs or W&B exports. Runs whose names differ in
the seed alone are one line with a band (sample standard deviation); a label=PATH joins whatever
has the same label.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from gns_pretrain.errors import InputError
from gns_pretrain.results.curves import AXES, Noise, grouped, read_curves
from gns_pretrain.results.figures import PANELS, draw


def main() -> int:
    """Exit code 0: drawn; 2: bad input."""
    arguments = _parser().parse_intermixed_args()
    try:
        groups = grouped(arguments.runs)
        noise = named_noise(arguments.noise) if arguments.noise else None
        panels = draw(
            {
                label: [read_curves(path, axis=arguments.x, noise=noise) for path in paths]
                for label, paths in groups.items()
            },
            arguments.out,
            panels=arguments.panels and arguments.panels.split(","),
            axis=arguments.x,
            each_seed=arguments.each_seed,
            title=arguments.title,
            focus=arguments.focus,
        )
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        return 2
    drawn = {
        "out": [str(path) for path in arguments.out],
        "panels": panels,
        "runs": {label: [str(path) for path in paths] for label, paths in groups.items()},
    }
    if arguments.json:
        sys.stdout.write(json.dumps(drawn) + "\n")
    else:
        seeds = ", ".join(f"{label} ({len(paths)})" for label, paths in groups.items())
        sys.stdout.write(f"{', '.join(drawn['out'])}: {', '.join(panels)} of {seeds}\n")
    return 0


def named_noise(text: str) -> Noise:
    """Geometry and estimate of GEOMETRY/ESTIMATE."""
    geometry, slash, estimate = text.partition("/")
    if not (geometry and slash and estimate):
        raise InputError(
            f"--noise {text} is not GEOMETRY/ESTIMATE, as in --noise manhattan/plug_in"
        )
    return geometry, estimate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="PATH|LABEL=PATH", help="run directory, folder of them, or CSV"
    )
    parser.add_argument(
        "--out", type=Path, action="append", required=True, help="file.png or file.pdf; repeatable"
    )
    parser.add_argument("--x", choices=AXES, default="step", help="x-axis (default: step)")
    parser.add_argument(
        "--panels", help=f"of {','.join(PANELS)} (default: the paper's four, where runs have them)"
    )
    parser.add_argument(
        "--noise",
        metavar="GEOMETRY/ESTIMATE",
        help="whose noise scale, as manhattan/plug_in (default: the one that chose the batch)",
    )
    parser.add_argument(
        "--each-seed", action="store_true", help="a line for every seed, instead of a band"
    )
    parser.add_argument(
        "--focus",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="the y-axis of a loss fits what comes after this share of a run (default: 0.15, "
        "the paper's warm-up); 0 shows all",
    )
    parser.add_argument("--title", help="over the figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
