"""Runs as one pandas frame, whichever source they come from, and their curves as pandas series.

A frame of runs has a row for each run:

    name                        its directory, its name in W&B, or its CSV
    table, cell, seed, scale    where its settings put it
    settings                    flat, by dotted name; cell and seed alone for a CSV
    finished                    whether it has spent its token budget
    steps                       all its optimizer steps
    read                        returns its evaluations by a score: a curve over steps

A curve is a float64 series of a quantity over ascending steps, tokens or images. A loss is in nats
per token or image; a batch size and a noise scale are in sequences or images.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gns_pretrain.errors import DamagedFileError, InputError, needs
from gns_pretrain.noise_scale.geometries import GAINS
from gns_pretrain.results.labels import seed_in_name
from gns_pretrain.results.layouts import Score
from gns_pretrain.runs.directory import (
    METRICS,
    SUMMARY,
    read_settings,
    read_summary,
    run_directories,
)
from gns_pretrain.runs.identity import flatten, settings_of_run
from gns_pretrain.tracking.jsonl import (
    READ_AT,
    BatchSizeLine,
    NoiseLine,
    TrainLine,
    ValidationLine,
    read_records,
    written_at,
)
from gns_pretrain.tracking.unit import unit_of
from gns_pretrain.tracking.wandb import tracked_runs

with needs("results", "results are read with pandas"):
    import pandas as pd  # the rest of this package takes it from here: one error without it

Runs: TypeAlias = pd.DataFrame
Curve: TypeAlias = pd.Series
Noise = tuple[str, str]  # geometry and estimate of a noise scale
WhoseNoise = Noise | Literal["all"] | None  # None: the one that chose the batch, else the first

RUN_COLUMNS = ["name", "table", "cell", "seed", "scale", "settings", "finished", "steps", "read"]
NOISE_SCALE = "noise_scale"
# That have a curve, beside noise scales.
QUANTITIES = ("loss", "accuracy", "train_loss", "batch_size", "lr")
PUBLISHED_AVERAGE = "adaptive_batch_metrics/gns_ema"  # of a noise scale that no file names
# Columns of a record, and what a CSV may call them: as our runs log them, as the published ones do.
COLUMNS = {
    "step": ("trainer/step", "_step", "Step"),
    "tokens": ("trainer/tokens", "n_tokens_seen"),
    "samples": ("trainer/samples",),  # of a record without tokens: images
    "loss": ("val/loss", "validation_metrics/loss"),
    "accuracy": ("val/accuracy",),
    "train_loss": ("train/loss", "loss_metrics/global_avg_loss"),
    "batch_size": ("train/batch_size", "batch_size/global_batch_size"),
    "lr": ("train/lr", "lr"),
    "grad_norm": ("train/grad_norm",),
    PUBLISHED_AVERAGE: (PUBLISHED_AVERAGE,),
}
NUM_SAMPLES = "num_samples"  # of the measured step
NOISE_PARTS = ("noise", "signal", "noise_ema", "signal_ema", "noise_scale", "noise_scale_ema")


def runs_of_folders(paths: Iterable[Path]) -> tuple[Runs, list[str]]:
    """Every run in these folders, of whatever table, once; a line for each that is damaged.

    Raises:
        InputError: a folder is missing, or all runs are damaged.
    """
    directories = {
        directory.resolve(): directory for path in paths for directory in run_directories(path)
    }
    rows, damaged = [], []
    for directory in directories.values():
        try:
            summary, settings = read_summary(directory), settings_of_run(directory)
            finished, steps = summary.get("state") == "finished", summary.get("steps")
            if finished and steps is None:
                raise DamagedFileError(f"{directory / SUMMARY} lacks the entry 'steps'; restore it")
        except DamagedFileError as error:
            damaged.append(error)
        else:
            read = partial(scores_of, directory)
            rows.append(_run(str(directory), settings, finished, steps, read))
    return pd.DataFrame(rows, columns=RUN_COLUMNS), lines_beside(rows, damaged)


def lines_beside(read: Sized, damaged: Sequence[DamagedFileError]) -> list[str]:
    """A line for each run that cannot be read: it hides no other one.

    Args:
        read: the others.
        damaged: why these cannot be.

    Raises:
        DamagedFileError: the first, where there are no others.
    """
    if damaged and not len(read):
        raise damaged[0]
    return [f"left out: {error}" for error in damaged]


def runs_of_project(project: str, table: str) -> Runs:
    """Read the runs of a W&B project that carry a table's name; InputError if it fails."""
    rows = []
    for run in tracked_runs(project, filters={"config.table": table}):
        read = lambda score, run=run: falling(score, to_curve(run.validation(score)))  # noqa: E731
        rows.append(_run(run.name, flatten(run.config), run.finished, run.steps, read))
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def runs_of_curves(cells: Mapping[str, Sequence[Path]]) -> Runs:
    """Published curves as finished runs of their cells.

    A run's seed is the one in its file's name, else its number among the files of the cell, from 0;
    its steps are those of the last row with a validation loss.

    Raises:
        InputError: a file is no curve, or two files of a cell have one seed.
    """
    rows = {}
    for cell, paths in cells.items():
        for number, path in enumerate(paths):
            named = seed_in_name(path)
            seed = number if named is None else named
            if (cell, seed) in rows:
                raise InputError(
                    f"{cell}={path}: the cell has a curve of seed {seed} already; give it once"
                )
            losses = scores_of(path, "loss")
            steps = int(losses.index[-1]) if len(losses) else 0
            settings = {"cell": cell, "seed": seed}
            rows[cell, seed] = _run(str(path), settings, True, steps, partial(scores_of, path))
    return pd.DataFrame(list(rows.values()), columns=RUN_COLUMNS)


def _run(name: str, settings: dict[str, Any], *results: Any) -> tuple[Any, ...]:
    """A row of the frame; `results` are its last columns."""
    return (
        name,
        settings.get("table"),
        str(settings.get("cell")),
        int(settings.get("seed", 0)),
        str(settings.get("scale.name")),
        settings,
        *results,
    )


def scores_of(path: Path, score: Score) -> Curve:
    """Evaluations over steps of a run directory or a CSV, `falling`; empty where there are none."""
    return falling(score, read_curves(path).get(score, to_curve([])))


def hours_of(run: str) -> Curve:
    """Hours of training steps since the first, by the end of each step, of a run's directory.

    Wall time as the record has it, without evaluations, checkpoints and the time between starts;
    empty where the record holds none: a CSV, a run of W&B.
    """
    if not Path(run).is_dir():
        return to_curve([])
    lines = open_record(Path(run)).lines
    return to_curve(lines.reindex(columns=["step", "step_seconds"]).dropna()).cumsum() / 3600


def falling(score: Score, curve: Curve) -> Curve:
    """A score as a number that is lower where a run is better: the loss, or the errors in percent.

    `shown_score` is its inverse.
    """
    return curve if score == "loss" else 100.0 - 100.0 * curve


def shown_score(score: Score, value: float) -> float:
    """A loss in nats, or an accuracy in percent, of what `falling` returned."""
    return value if score == "loss" else 100.0 - value


def with_losses(runs: Runs, score: Score = "loss") -> tuple[Runs, list[str]]:
    """Those runs that have been evaluated, as `losses` over steps; a line for each other one.

    Args:
        runs: of any source.
        score: what stands for a loss, see `falling`.

    Raises:
        DamagedFileError: no run has any.
    """
    curves, damaged = {}, []
    for index, name, read in zip(runs.index, runs["name"], runs["read"], strict=True):
        try:
            curves[index] = read(score)
            if curves[index].empty:
                raise DamagedFileError(f"{name} holds no validation {score}; a table needs some")
        except DamagedFileError as error:
            curves.pop(index, None)
            damaged.append(error)
    kept = runs.loc[list(curves)].assign(losses=pd.Series(curves, dtype=object))
    return kept, lines_beside(kept, damaged)


def to_curve(points: Any) -> Curve:
    """A curve through points [n, 2] of a record; what a resumed run repeats replaces the first."""
    pairs = np.array(points, dtype=np.float64).reshape(-1, 2)
    pairs = pairs[unrepeated(pairs[:, 0])]
    return pd.Series(pairs[:, 1], index=pairs[:, 0])


def unrepeated(x: Any) -> NDArray[np.bool_]:
    """Which steps of a record [n] count: those that no smaller or equal one follows."""
    later = np.minimum.accumulate(np.asarray(x, dtype=np.float64)[::-1])[::-1]
    return np.asarray(x) < np.append(later[1:], np.inf)


@dataclass(frozen=True)
class Record:
    """What a file holds of a run: `lines` has a row for each of its lines, in the file's order.

    The columns: `where` it stands, `kind` of a metrics.jsonl's line (a row of a CSV has none: it
    holds all of a step), and as float64, NaN where it holds nothing, COLUMNS,
    noise/<geometry>/<estimate>/<part> and READ_AT, the step at whose end a noise scale was read.
    """

    path: Path
    lines: pd.DataFrame
    names: Sequence[str] = ()  # of all columns of a CSV
    followed: Noise | None = None  # the noise scale by which the policy of a run chose the batch

    @property
    def noises(self) -> list[str]:
        """Names of the averaged noise scales, <geometry>/<estimate>, in the record's order."""
        ends = "noise/", "/noise_scale_ema"
        return [
            column.removeprefix(ends[0]).removesuffix(ends[1])
            for column in self.lines
            if column.startswith(ends[0]) and column.endswith(ends[1])
        ]

    def has(self, column: str) -> bool:
        """Whether the record holds any number of a column."""
        return column in self.lines and bool(self.lines[column].notna().any())

    def require(self, *columns: str) -> str:
        """The first of these columns that is there; InputError names what CSVs call them."""
        for column in columns:
            if column in self.lines:
                return column
        names = [name for column in columns for name in COLUMNS.get(column, (column,))]
        raise InputError(
            f"{self.path} has no column {' or '.join(names)}; "
            f"it has {', '.join(self.names) or 'none'}"
        )

    def name_of(self, column: str) -> str:
        return next((name for name in COLUMNS[column] if name in self.names), column)

    def noise_columns(self, noise: Noise, *, raw: bool) -> list[str]:
        """Columns of noise and signal, or of their quotient; InputError if neither is there."""
        parts = ("noise", "signal") if raw else ("noise_ema", "signal_ema")
        columns = [noise_column(noise, part) for part in parts]
        if all(column in self.lines for column in columns):
            return columns
        if raw:
            raise InputError(
                f"{self.path} has no columns {columns[0]} and .../signal, only averages: they "
                "cannot be averaged anew; leave out --noise-decay, --signal-decay and norm_test"
            )
        return [self.require(noise_column(noise, "noise_scale_ema"), PUBLISHED_AVERAGE)]

    def gain_columns(self, noise: Noise) -> list[str]:
        """Columns of what parts of the step gain, smallest first, then of samples and step."""
        gains = [self.require(noise_column(noise, gain)) for gain in GAINS]
        return [*gains, NUM_SAMPLES, "step"]

    def curves(self, axis: str, noise: WhoseNoise = None) -> dict[str, Curve]:
        """Curves by quantity: QUANTITIES, and noise_scale/<geometry>/<estimate>.

        A published noise scale, of which no file says whose it is, is noise_scale.

        Raises:
            InputError: there is no such axis, or a CSV holds no curve.
        """
        self.require(axis)
        if noise is None:
            followed = "/".join(self.followed or ())
            wanted = [followed] if followed in self.noises else self.noises[:1]
        else:
            wanted = [name for name in self.noises if noise == "all" or name == "/".join(noise)]
        columns = dict(zip(QUANTITIES, QUANTITIES, strict=True))
        columns |= {f"{NOISE_SCALE}/{name}": f"noise/{name}/noise_scale_ema" for name in wanted}
        if not wanted:
            columns[NOISE_SCALE] = PUBLISHED_AVERAGE
        found = {
            quantity: to_curve(points)
            for quantity, column in columns.items()
            if column in self.lines and len(points := self.lines[[axis, column]].dropna())
        }
        if self.names and not found:
            raise InputError(f"{self.path} holds no curve; it has {', '.join(self.names)}")
        return found


def noise_column(noise: Noise, part: str) -> str:
    return "noise/{}/{}/{}".format(*noise, part)


def named_noise(text: str) -> WhoseNoise:
    """Geometry and estimate of GEOMETRY/ESTIMATE, or all."""
    if text == "all":
        return "all"
    geometry, _, estimate = text.partition("/")
    if not (geometry and estimate):
        raise InputError(
            f"--noise {text} is neither all nor GEOMETRY/ESTIMATE, as in manhattan/plug_in"
        )
    return geometry, estimate


def read_curves(path: Path, *, axis: str = "step", noise: WhoseNoise = None) -> dict[str, Curve]:
    """All curves that a run directory or a CSV holds, by quantity (`Record.curves`).

    Raises:
        InputError: the file cannot be read, or has no such axis.
    """
    return open_record(path).curves(axis, noise)


def open_record(path: Path) -> Record:
    """Read a run directory, finished or not, or a CSV.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if path.is_dir():
        policy = read_settings(path).get("batch_size") or {}
        followed = (str(policy.get("geometry")), str(policy.get("estimate")))
        return replace(read_jsonl(path / METRICS), followed=followed)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; name a run directory or a CSV")
    return read_csv(path)


def read_jsonl(path: Path) -> Record:
    """Read steps, evaluations, noise scales and changes of the batch size of a metrics.jsonl.

    Raises:
        DamagedFileError: it cannot be read.
    """
    columns: dict[Any, tuple[str, ...]] = {
        TrainLine.kind: (
            *("batch_size", "lr", "grad_norm", "micro_batch_size", "accumulation"),
            *("step_seconds", "tokens_per_second", "samples_per_second"),
        ),
        BatchSizeLine.kind: ("from", "to", "target", "lr_multiplier", "why"),
        ValidationLine.kind: ("loss", "accuracy"),
    }
    rows = []
    for number, line in enumerate(read_records(path), start=1):
        kind = str(line.get("kind"))
        if kind == NoiseLine.kind:
            measured = (str(line.get("geometry")), str(line.get("estimate")))
            parts = (*NOISE_PARTS, *(part for part in GAINS if part in line))
            row = {noise_column(measured, part): line.get(part) for part in parts}
            row |= {NUM_SAMPLES: line.get(NUM_SAMPLES), READ_AT: written_at(line)}
        elif kind in columns:
            row = {name: line.get(name) for name in columns[kind]}
            if kind == TrainLine.kind:
                row["train_loss"] = line.get("loss")
        else:
            continue
        unit = unit_of(line).name
        place = {"where": f"line {number}", "step": line.get("step"), unit: line.get(unit)}
        rows.append(row | place | {"kind": kind})
    lines = pd.DataFrame(rows)
    lines = lines.reindex(columns=list(dict.fromkeys(["where", "kind", *COLUMNS, *lines])))
    for unit in ("tokens", "samples"):  # which the lines of one step have in common
        counts = lines[["step", unit]].dropna().drop_duplicates("step", keep="last")
        lines[unit] = lines["step"].map(counts.set_index("step")[unit])
    return Record(path, lines)


def read_csv(path: Path, run: str | None = None) -> Record:
    """A published curve or a W&B export, a panel's too: it names a column "<run> - <metric>".

    `run` is the one to take of a panel's export that holds several.

    Raises:
        InputError: it is not a CSV, or holds several runs and none is named, or what should be a
            number is none.
    """
    options = {"header": None, "dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        # Without a header pandas leaves repeated names alone: two runs of one name are refused.
        cells = pd.read_csv(path, encoding="utf-8-sig", **options)
    except pd.errors.EmptyDataError:
        cells = pd.DataFrame([[]])
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is not a CSV that can be read ({error})") from error
    texts: dict[str, Any] = {}
    for number, name in cells.iloc[0].items():
        owner, _, plain = str(name).rpartition(" - ")
        if plain.endswith(("__MIN", "__MAX")) or (owner and run and owner != run):
            continue
        if plain in texts:
            raise InputError(
                f"{path} holds {plain} of several runs; name one, as in --run '{owner}'"
            )
        texts[plain] = cells[number].iloc[1:]
    lines = pd.DataFrame({"where": [f"row {number}" for number in range(2, len(cells) + 1)]})
    lines["kind"] = None
    names = COLUMNS | {name: (name,) for name in texts if name.startswith("noise/")}
    for column, candidates in names.items():
        name = next((name for name in candidates if name in texts), None)
        if name is None:
            continue
        values = []
        for where, text in zip(lines["where"], texts[name], strict=True):
            try:
                values.append(float(text))  # exact to the last bit; NaN where empty
            except ValueError:
                raise InputError(
                    f"{path}, {where}: {name} is {text!r} and not a number; mend the row"
                ) from None
        lines[column] = values
    return Record(path, lines, list(texts))
