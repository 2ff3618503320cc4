"""The record of a run, ours or somebody else's, as the steps and measurements of a replay.

    published curve   CSV: _step, n_tokens_seen, batch_size/global_batch_size, lr,
                      adaptive_batch_metrics/gns_ema
    W&B export        CSV: a run's history with the same names, or with those that our runs log
                      (trainer/step, train/lr, noise/<geometry>/<estimate>/...), or a panel's
                      export, whose columns begin with the run's name
    metrics.jsonl     ours

Columns and rows may be missing: what is there is compared.
"""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.tracking.jsonl import read_records

# Names of one quantity, ours first, then those of the published runs.
STEP = ("trainer/step", "_step", "Step")
TOKENS = ("trainer/tokens", "n_tokens_seen")
BATCH_SIZE = ("train/batch_size", "batch_size/global_batch_size")
LEARNING_RATE = ("train/lr", "lr")
PUBLISHED_AVERAGE = "adaptive_batch_metrics/gns_ema"


@dataclass(frozen=True)
class Row:
    """What a record says of one step; None where it says nothing.

    Args:
        step: from 1.
        where: row or line of the file.
        batch_size: sequences of the step.
        tokens: consumed when it was done.
        lr: learning rate of the step.
    """

    step: int
    where: str
    batch_size: int | None
    tokens: int | None
    lr: float | None


@dataclass
class History:
    """A record, ready to be replayed.

    Args:
        rows: by ascending step.
        measurements: of one geometry and estimate, by the step that was measured.
        averaged: whether they are the record's own averages, not to be averaged once more.
        first: the first step's own numbers (`metrics.jsonl` alone has more than a row's).
        notes: what a reader should know about the file.
    """

    rows: list[Row]
    measurements: dict[int, Measurement]
    averaged: bool
    first: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_history(
    path: Path, *, reads: tuple[str, str] | None, raw: bool, run: str | None = None
) -> History:
    """Read a CSV or a metrics.jsonl.

    Args:
        path: ends in .jsonl, or holds a CSV.
        reads: geometry and estimate of the noise scale to take; None to take none.
        raw: take single measurements, to average them anew, instead of the record's own averages.
        run: of a panel's export that holds several.

    Raises:
        InputError: the file cannot be read, or lacks what a replay needs.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; name a CSV or a metrics.jsonl")
    if path.suffix == ".jsonl":
        return from_jsonl(path, reads=reads, raw=raw)
    return from_csv(path, reads=reads, raw=raw, run=run)


def from_jsonl(path: Path, *, reads: tuple[str, str] | None, raw: bool) -> History:
    """Our own record: its training and noise lines."""
    rows: list[Row] = []
    measurements: dict[int, Measurement] = {}
    first: dict[str, Any] = {}
    for number, record in enumerate(read_records(path), start=1):
        if record["kind"] == "train":
            first = first or record
            values = (record[name] for name in ("batch_size", "tokens", "lr"))
            rows.append(Row(record["step"], f"line {number}", *values))
        elif (
            reads
            and record["kind"] == "noise"
            and (record["geometry"], record["estimate"]) == reads
        ):
            pair = ("noise", "signal") if raw else ("noise_ema", "signal_ema")
            measurements[record["step"]] = Measurement(
                *reads, record[pair[0]], record[pair[1]], record["num_samples"], 0
            )
    if not rows:
        raise InputError(f"{path} holds no training step; name the metrics.jsonl of a run")
    return History(rows, measurements, averaged=not raw, first=first)


def from_csv(path: Path, *, reads: tuple[str, str] | None, raw: bool, run: str | None) -> History:
    """A published curve or a W&B export."""
    table = Table.read(path, run)
    step = table.require(STEP)
    noise, signal = noise_columns(table, reads, raw=raw) if reads else (None, None)
    batch_size = table.require(BATCH_SIZE)
    tokens, lr = table.find(TOKENS), table.find(LEARNING_RATE)
    history = History([], {}, averaged=not raw)
    if reads and noise == table.columns.get(PUBLISHED_AVERAGE):
        history.notes.append(
            f"the file does not say whose noise scale {PUBLISHED_AVERAGE} is; "
            f"taken as {' '.join(reads)}"
        )
    for index in range(len(table.rows)):
        number, where = table.whole(index, step), f"row {index + 2}"
        if number is None:
            raise InputError(f"{path}, {where}: {step} is empty; every row needs its step")
        if number < 1:
            history.notes.append(f"{where}: step {number} comes before the first one; left out")
            continue
        cut_back(history, number)
        batch, seen = table.whole(index, batch_size), table.whole(index, tokens)
        history.rows.append(Row(number, where, batch, seen, table.number(index, lr)))
        top, bottom = table.number(index, noise), table.number(index, signal) if signal else 1.0
        if reads and top is not None and bottom is not None:
            history.measurements[number] = Measurement(*reads, top, bottom, 0, 0)
    if all(row.batch_size is None for row in history.rows):
        raise InputError(f"{path} holds no batch size to compare with; export the run once more")
    return history


def noise_columns(table: "Table", reads: tuple[str, str], *, raw: bool) -> tuple[str, str | None]:
    """Columns of a noise scale's two parts, or that of their quotient and None.

    Raises:
        InputError: there are none; single measurements cannot be had from averages.
    """
    prefix, ending = f"noise/{reads[0]}/{reads[1]}", "" if raw else "_ema"
    noise = table.find((f"{prefix}/noise{ending}",))
    signal = table.find((f"{prefix}/signal{ending}",))
    if noise is not None and signal is not None:
        return noise, signal
    if raw:
        raise InputError(
            f"{table.path} has no columns {prefix}/noise and .../signal, only averages: they "
            "cannot be averaged anew; leave out --noise-decay, --signal-decay and norm_test"
        )
    return table.require((f"{prefix}/noise_scale_ema", PUBLISHED_AVERAGE)), None


def cut_back(history: History, step: int) -> None:
    """Drop what a resumed run did again, so that its later rows stand."""
    repeated = [row.step for row in history.rows if row.step >= step]
    if repeated:
        history.rows = [row for row in history.rows if row.step < step]
        kept = history.measurements.items()
        history.measurements = {at: measured for at, measured in kept if at < step}
        history.notes.append(
            f"steps {step:,} to {repeated[-1]:,} come twice, as in a run that was resumed: "
            "the later rows count"
        )


@dataclass(frozen=True)
class Table:
    """A CSV by the plain names of its columns."""

    path: Path
    columns: dict[str, str]  # plain name to the name in the file
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, path: Path, run: str | None) -> "Table":
        """Read a file; a panel's export names a column "<run> - <metric>"."""
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                rows, names = list(reader), list(reader.fieldnames or [])
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a CSV that can be read ({error})") from error
        columns: dict[str, str] = {}
        for name in names:
            owner, _, plain = name.rpartition(" - ")
            if plain.endswith(("__MIN", "__MAX")) or (owner and run and owner != run):
                continue
            if plain in columns:
                raise InputError(
                    f"{path} holds {plain} of several runs; name one, as in --run '{owner}'"
                )
            columns[plain] = name
        return cls(path, columns, rows)

    def find(self, names: tuple[str, ...]) -> str | None:
        """The column of the first of these names that is there."""
        return next((self.columns[name] for name in names if name in self.columns), None)

    def require(self, names: tuple[str, ...]) -> str:
        """The same, where there has to be one."""
        found = self.find(names)
        if found is None:
            raise InputError(
                f"{self.path} has no column {' or '.join(names)}; "
                f"it has {', '.join(self.columns) or 'none'}"
            )
        return found

    def number(self, index: int, column: str | None) -> float | None:
        """A cell; None where it is empty, or the column is not there."""
        text = ((self.rows[index].get(column) if column else None) or "").strip()
        try:
            value = float(text) if text else math.nan
        except ValueError:
            raise InputError(
                f"{self.path}, row {index + 2}: {column} is {text!r} and not a number; mend the row"
            ) from None
        return None if math.isnan(value) else value

    def whole(self, index: int, column: str | None) -> int | None:
        """The same, of a column that counts."""
        value = self.number(index, column)
        if value is not None and not value.is_integer():
            raise InputError(
                f"{self.path}, row {index + 2}: {column} is {value} and not a whole number"
            )
        return None if value is None else round(value)
