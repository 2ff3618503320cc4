"""Runs on one self-contained page: a table, curves to explore, and their settings side by side.

The page is report.html with report.js, the runs as JSON and the library plotly.js in it (5 MB). It
requests nothing from any server, and its policy forbids it to; the policy names the two scripts by
their hashes, so that nothing else is executed, whatever a run directory holds.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from gns_pretrain.errors import DamagedFileError, counted, needs, printable
from gns_pretrain.results.figures import thinned
from gns_pretrain.results.frame import (
    PUBLISHED_AVERAGE,
    lines_beside,
    open_record,
    pd,
    unrepeated,
)
from gns_pretrain.results.labels import distinct_names, seed_in_name
from gns_pretrain.runs.identity import Purpose, settings_of_run, varying_settings

AXES = ["step", "tokens", "samples", "seconds"]
SPEEDS = ["tokens_per_second", "samples_per_second"]
TRAIN = ["train_loss", "lr", "grad_norm", "batch_size", "step_seconds", *SPEEDS]
NOISE_SCALES = ["noise_scale", "noise_scale_ema"]
DECISION = ["from", "to", "target", "lr_multiplier", "why"]
DIGITS = 7  # of a number
LARGEST = 2**53  # integers beyond it are no numbers in JavaScript

Outcome = tuple[str, str]  # of a run: its state, and why it failed if it did


def report(
    groups: Mapping[str, Sequence[Path]], *, title: str, outcome: Callable[[Path], Outcome]
) -> tuple[str, list[str]]:
    """The page's HTML, and a line for each run that is left out because it is damaged.

    Args:
        groups: run directories and CSVs by label; those of one label have one color.
        title: of the page.
        outcome: of a run directory.

    Raises:
        InputError: plotly is not installed.
        DamagedFileError: no run can be read.
    """
    with needs("report", "the curves of a report are drawn by plotly"):
        from plotly.offline import get_plotlyjs
    runs: list[dict[str, Any]] = []
    read, damaged = [], []
    for label, paths in groups.items():
        for path in paths:
            seed = seed_in_name(path)
            own = path.stem if seed is None else f"seed {seed}"
            names = {"group": label, "short": label if len(paths) == 1 else f"{label}, {own}"}
            try:
                runs.append(names | _content(path, outcome))
                read.append(path)
            except DamagedFileError as error:
                damaged.append(error)
    notes = lines_beside(runs, damaged)
    for run, name in zip(runs, distinct_names(read), strict=True):
        run["name"] = name
    known = [run["settings"] for run in runs if run["settings"]]
    content = {
        "about": f"{counted(len(runs), 'run')}, sorted by the lowest validation loss",
        "notes": notes,
        "varying": varying_settings(known, Purpose.RECORD),
        "runs": runs,
    }
    package = files(__package__)
    scripts = {
        "library": get_plotlyjs().replace("\r\n", "\n"),  # as a browser reads it, for the hash
        "script": package.joinpath("report.js").read_text("utf-8"),
    }
    hashes = " ".join(map(_policy_hash, scripts.values()))
    page = Template(package.joinpath("report.html").read_text("utf-8")).substitute(
        title=html.escape(printable(title)),
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; form-action 'none'; base-uri 'none'",
        data=_json_in_html(content),
        **scripts,
    )
    return page, notes


def _content(path: Path, outcome: Callable[[Path], Outcome]) -> dict[str, Any]:
    """What the page shows of a run directory or a CSV; DamagedFileError if it cannot be read."""
    record = open_record(path)
    if "step" not in record.lines:
        raise DamagedFileError(f"{path} has no column of steps, as _step; leave it out")
    state, error = outcome(path) if path.is_dir() else ("CSV", "")
    decisions = record.lines[record.lines["kind"] == "batch_size"]
    others = record.lines[record.lines["kind"] != "batch_size"]
    train = _rows(others, *TRAIN)
    validation = _rows(others, "loss", "accuracy")
    batches = _rows(others, "batch_size")
    changes = batches["batch_size"].ne(batches["batch_size"].shift())
    changes.iloc[-1:] = True  # the last size is drawn to the run's end
    noise = {name: [f"noise/{name}/{part}" for part in NOISE_SCALES] for name in record.noises}
    times = train["step_seconds"].fillna(0.0).cumsum().set_axis(train["step"])
    if train["step_seconds"].isna().all():  # a CSV has none
        times = times.iloc[:0]
    return {
        "outcome": state,
        "error": error,
        "settings": settings_of_run(path) if path.is_dir() else {},
        "followed": "/".join(record.followed or ()),
        "results": {
            "lowest validation loss": validation["loss"].min(),
            "final validation loss": _last(validation["loss"]),
            "steps": _last(train["step"] if len(train) else validation["step"]),
            **{
                name: count
                for name in ("tokens", "samples")
                if (count := _last((train if len(train) else validation)[name])) is not None
            },
            "final batch": _last(batches["batch_size"]),
            "time": _last(times),
            "speed": train[SPEEDS].median().max(),  # it has one of them
        },
        "train": _curves(train, TRAIN, times),
        "validation": _curves(validation, ["loss", "accuracy"], times),
        "batch": _curves(batches[changes], ["batch_size"], times),
        "noise": {
            name: _curves(_rows(others, *columns), columns, times)
            for name, columns in (noise or {"published average": [PUBLISHED_AVERAGE]}).items()
        },
        "decisions": _curves(decisions, DECISION, times),
    }


def _rows(lines: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Rows of a record that hold any of these columns, one for each step."""
    rows = lines.reindex(columns=["step", "tokens", "samples", *columns]).dropna(subset=["step"])
    rows = rows.dropna(subset=columns, how="all")
    return rows[unrepeated(rows["step"])]


def _last(values: pd.Series) -> Any:
    known = values.dropna().tolist()
    return known[-1] if known else None


def _curves(rows: pd.DataFrame, columns: Sequence[str], times: pd.Series) -> dict[str, list[Any]]:
    """Columns of a record's rows as lists, with the steps, tokens and seconds at which they are.

    Args:
        rows: as of `_rows`.
        columns: to take; one that holds nothing is left out.
        times: seconds of training so far, by step; empty where they are not known.
    """
    rows = thinned(rows)
    seconds = rows["step"].map(times).where(rows["step"] > 0, 0.0) if len(times) else None
    rows = rows.assign(seconds=seconds).reindex(columns=[*AXES, *columns])
    return {
        name.rpartition("/")[2]: values.tolist()
        for name, values in rows.items()
        if values.notna().any()
    }


def _json_in_html(content: dict[str, Any]) -> str:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _plain(value: Any) -> Any:
    """What JSON and a screen can show of a value out of a file."""
    if isinstance(value, dict):
        return {_plain(str(name)): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) < LARGEST:
        return int(value) if value % 1 == 0 else float(f"{value:.{DIGITS}g}")
    if isinstance(value, float) and math.isnan(value):
        return None  # of a record: nothing is there
    return printable(str(value))


def _policy_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
