"""Draw runs as the paper's Figures 1 to 3: perplexity, batch size, noise scale, learning rate.

    gns-pretrain plot-runs outputs/table2-signum_* --out signum.png --out signum.pdf
    gns-pretrain plot-runs outputs/table2-signum_* --paper figures/ --width page --out compare.pdf
    gns-pretrain plot-runs outputs/measured --noise all --panels losses,noise_scale --out noise.png
    gns-pretrain plot-runs 'B = 64=figure2/signum_64.csv' adaptive=figure2/signum_gns.csv \\
        mine=outputs/table2-signum_adaptive-paper-seed0 --out compare.pdf

Run directories, folders of them, and published CSVs or W&B exports. Runs whose names differ in
the seed alone are one line with a band (mean and sample standard deviation over the seeds that are
there; a tick where one ends before the others); a label=PATH joins whatever has the same label.
Other names are cut to what differs between them.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gns_pretrain.errors import DamagedFileError, InputError
from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.results.figures import AXIS_LABELS, PANELS, SIZES, Curves, draw, notes_on_ends
from gns_pretrain.results.frame import (
    Record,
    lines_beside,
    named_noise,
    open_record,
)
from gns_pretrain.results.labels import grouped, natural_order
from gns_pretrain.results.layouts import LAYOUTS, PUBLISHED_CURVES
from gns_pretrain.runs.directory import read_settings
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
    option(
        "--x",
        choices=AXIS_LABELS,
        help="x-axis (default: tokens, or images, where the runs have different numbers of steps, "
        "else step)",
    )
    option(
        "--panels", help=f"of {','.join(PANELS)} (default: the paper's four, where runs have them)"
    )
    option(
        "--noise",
        metavar="GEOMETRY/ESTIMATE",
        help="whose noise scale, as manhattan/plug_in, or all (default: the one that chose the "
        "batch)",
    )
    option(
        "--paper",
        type=path_argument,
        metavar="FOLDER",
        help="draw the paper's curves of the runs' cells beside them: a folder with the CSVs of "
        "its arXiv source (signum_64.csv, ..., at any depth)",
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
    option(
        "--smooth",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="the training loss is averaged over this share of a run (default: 0.02); 0 shows each "
        "step",
    )
    option(
        "--width",
        choices=SIZES,
        default="screen",
        help="of the figure and its fonts: column and page are those of a paper in two columns, "
        "3.25 and 6.75 inches (default: screen)",
    )
    option("--title", help="over the figure")
    option("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args()
    noise = named_noise(given.noise) if given.noise else None
    records, damaged = read_records(grouped(given.runs))
    write(*lines_beside(records, damaged), file=sys.stderr)
    partners = {}
    if given.paper:
        partners = published_beside(records, given.paper)
    axis = given.x or common_axis(records)
    curves: dict[str, list[Curves]] = {
        label: [record.curves(axis, noise) for record in of_label.values()]
        for label, of_label in records.items()
    }
    panels = draw(
        curves,
        given.out,
        panels=given.panels and given.panels.split(","),
        axis=axis,
        each_seed=given.each_seed,
        title=given.title,
        focus=given.focus,
        smooth=given.smooth,
        size=given.width,
        partners=partners,
    )
    if not given.each_seed:
        for note in notes_on_ends(curves, panels, axis):
            write(f"note: {note}", file=sys.stderr)
    drawn = {
        "out": [str(path) for path in given.out],
        "axis": axis,
        "panels": panels,
        "runs": {label: [str(path) for path in paths] for label, paths in records.items()},
    }
    if given.json:
        write(json.dumps(drawn))
    else:
        seeds = ", ".join(f"{label} ({len(paths)})" for label, paths in records.items())
        write(f"{', '.join(drawn['out'])}: {', '.join(panels)} of {seeds}")


Records = dict[str, dict[Path, Record]]  # by label and path


def read_records(groups: Mapping[str, Sequence[Path]]) -> tuple[Records, list[DamagedFileError]]:
    """Records of groups of runs, and why others cannot be read."""
    records: Records = {}
    damaged = []
    for label, paths in groups.items():
        for path in paths:
            try:
                records.setdefault(label, {})[path] = open_record(path)
            except DamagedFileError as error:
                damaged.append(error)
    return records, damaged


def common_axis(records: Records) -> str:
    """Tokens or images where the runs' numbers of steps differ and all have these; else step."""
    every = [record for of_label in records.values() for record in of_label.values()]
    steps = {record.lines["step"].max() for record in every if "step" in record.lines}
    shared = (unit for unit in ("tokens", "samples") if all(record.has(unit) for record in every))
    return next(shared, "step") if len(steps) > 1 else "step"


def published_beside(records: Records, folder: Path) -> dict[str, str]:
    """Add the published curves of the runs' cells, each after ours; return whose color they have.

    Raises:
        InputError: the folder has no curve of any of the cells.
    """
    ours, partners = dict(records), {}
    records.clear()
    for label, of_label in ours.items():
        records[label] = of_label
        settings = next((read_settings(path) for path in of_label if path.is_dir()), {})
        table, cell = str(settings.get("table")), str(settings.get("cell"))
        name = PUBLISHED_CURVES.get((table, cell))
        found = sorted(folder.rglob(name), key=natural_order) if name else []
        if found:
            beside = f"{label}, paper"
            records[beside] = {path: open_record(path) for path in found}
            partners[beside] = label
            scale = (settings.get("scale") or {}).get("name")
            paper_scale = LAYOUTS[table].paper_scale
            if scale != paper_scale:
                note = f"{label} is of scale {scale}, the paper's curve of {paper_scale}"
                write(f"note: {note}", file=sys.stderr)
    if not partners:
        known = ", ".join(sorted(set(PUBLISHED_CURVES.values())))
        raise InputError(
            f"--paper {folder}: it holds no curve of the runs' cells; the paper has {known}"
        )
    return partners
