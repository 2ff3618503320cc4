"""The run record on disk: metrics.jsonl, one JSON object per line, and summary.json made of it.

A class for each kind of line is the only place that names its fields. A line is whole once its
newline is there: what follows the last newline is a torn write, which resuming drops.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, get_type_hints

from gns_pretrain.errors import DamagedFileError, InputError, TrainingError
from gns_pretrain.system.files import (
    flush_to_disk,
    is_a,
    must_write,
    open_regular,
    read_bytes,
    shortened,
    write_bytes,
)
from gns_pretrain.tracking.unit import unit_of

METRICS, SUMMARY = "metrics.jsonl", "summary.json"  # in a run directory
TAIL_BYTES = 2**16  # hold many lines; what is rarer is looked for in ever more
READ_AT = "read_at_step"  # of a noise line: the step at whose end it was written, if a later one
RESTORE = "restore the file, or start over with resume=never"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line; its fields are written in this order."""

    kind: ClassVar[str]
    written_as: ClassVar[dict[str, str]] = {}  # names in the file that are no Python names
    left_out: ClassVar[tuple[str, ...]] = ()  # fields that are not written where they are None
    step: int  # from 1; 0 before the first
    more: dict[str, Any] = field(default_factory=dict)  # further fields, written after the others

    def as_record(self) -> dict[str, Any]:
        """Return the object that is written."""
        values = {
            self.written_as.get(name, name): value
            for name, value in vars(self).items()
            if value is not None or name not in self.left_out
        }
        more = values.pop("more")
        return {"kind": self.kind, **values, **more}


@dataclass(frozen=True, kw_only=True)
class TrainLine(Line):
    """One optimizer step.

    Among the further fields, `skipped` says why it changed no weight. On a GPU there are
    `peak_memory_gib`, what rank 0 has reserved at most so far, and, where the GPU's peak is known,
    `mfu`, the model's FLOPs over those of all GPUs at their bfloat16 peak.
    """

    kind = "train"
    left_out = ("tokens", "tokens_per_second", "samples_per_second")
    samples: int  # sequences or images consumed so far
    tokens: int | None = None  # consumed so far; of text
    # mean negative log-likelihood of the step's batch, nats per token or image
    loss: float
    lr: float
    grad_norm: float  # Euclidean, of the whole gradient, before clipping
    batch_size: int  # samples over all ranks
    micro_batch_size: int  # samples of one micro-batch on one rank
    accumulation: int  # micro-batches on each rank
    step_seconds: float  # wall time
    tokens_per_second: float | None = None  # of all ranks; of text
    samples_per_second: float | None = None  # of all ranks; of images


@dataclass(frozen=True, kw_only=True)
class ValidationLine(Line):
    """An evaluation after `step` steps.

    Among the further fields, `loss/NAME` is the loss of a source of a mixture, and `accuracy` the
    share of images that are classified right. `weights` is `averaged` where those were evaluated
    and not the last ones.
    """

    kind = "validation"
    left_out = ("tokens", "samples")
    tokens: int | None = None  # consumed so far; of text
    samples: int | None = None  # consumed so far; of images
    loss: float  # nats per token or image


@dataclass(frozen=True, kw_only=True)
class NoiseLine(Line):
    """One measurement of the noise scale in one geometry, by one estimate.

    `step` is the one that was measured; `more` has READ_AT where it was read later, and
    gain_eighth, gain_quarter and gain_half where the estimate is nested.
    """

    kind = "noise"
    geometry: str
    estimate: str
    noise: float  # of one sequence's gradient, in the geometry's unit
    signal: float  # same unit
    noise_scale: float | None  # their quotient, sequences; None where there is no signal
    noise_ema: float  # smoothed, as the next
    signal_ema: float
    noise_scale_ema: float | None  # the smoothed ones' quotient, sequences
    num_samples: int  # micro-batches over all ranks
    # of the whole measurement, all geometries together: host time on a CPU; on a GPU the time that
    # its kernels and collectives take there, by events
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BatchSizeLine(Line):
    """A decision of the batch-size policy; `step` is the first of the new size."""

    kind = "batch_size"
    written_as: ClassVar[dict[str, str]] = {"previous": "from", "new": "to"}
    previous: int  # sequences
    new: int  # sequences
    # Sequences before rounding; None where the ranks alone made another size necessary.
    target: float | None
    lr_multiplier: float  # on the scheduled learning rate from here on


@dataclass(frozen=True, kw_only=True)
class ShadowLine(BatchSizeLine):
    """What a policy that is not followed would have decided."""

    kind = "shadow"
    policy: str


class JsonLines:
    """Appends records to a file; a record that was written survives a kill of this process.

    Every record goes to the operating system immediately, whole and in one call. There is no buffer
    in this process that a kill could lose, and no second process that could interleave a line.

    Args:
        path: the file; its folder must exist. An existing file is appended to.

    Raises:
        InputError: the file cannot be opened for writing.
        TrainingError: the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        hint = "choose another run_name or fix the folder's permissions"
        with must_write(path, hint=hint):
            self._file = path.open("ab", buffering=0)
            flush_to_disk(path.parent)  # which holds the name of a new file

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Floats keep every bit: Python's shortest exact decimal form.

        Raises:
            TrainingError: the disk is full or gone, when a torn line may remain, which resuming
                drops; or the file has been moved or deleted, and nobody would find the line.
        """
        self._require_in_place()
        text = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        remaining = memoryview(text.encode())
        try:
            # A write may be cut short by a signal or a nearly full disk; the rest follows.
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise TrainingError(
                f"{self._path}: the line of step {record.get('step')} could not be written "
                f"({error.strerror}); saved checkpoints are good, fix the disk and repeat the "
                "command"
            ) from error

    def sync(self) -> None:
        """Wait until every record is on disk; OSError if it cannot be."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _require_in_place(self) -> None:
        try:
            in_place = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            in_place = False
        if not in_place:
            raise TrainingError(
                f"{self._path} or its folder has been moved or deleted, so the run stops; put it "
                "back and start the same command again, or restart with resume=never"
            )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records, in order, without a torn last line; empty where there is no file.

    Raises:
        DamagedFileError: the file cannot be read, or a whole line is none of a record's.
    """
    return [record for _, record in _whole_lines(path)]


def last_record(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read the last whole record (of a kind) from the end of a long file; {} if there is none.

    Raises:
        DamagedFileError: the file cannot be read, or a line that was looked at is none of a
            record's.
    """
    tail = TAIL_BYTES
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            while True:
                file.seek(-min(size, tail), os.SEEK_END)
                lines = file.read().split(b"\n")[:-1]  # what follows the last newline is torn
                # The tail begins in the middle of a line.
                whole = enumerate(reversed(lines[size > tail :]), start=1)
                records = (_parse(path, -number, line) for number, line in whole)
                if found := next((r for r in records if kind in (None, r.get("kind"))), None):
                    return found
                if tail >= size:
                    return {}
                tail *= 16
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}); {RESTORE}") from error


def truncate_after_step(path: Path, step: int) -> None:
    """Keep the lines written at `step` or before, byte for byte; drop a torn last line.

    A resumed run repeats the steps after its checkpoint; their old lines would be there twice. The
    new file is written beside and renamed, so that a kill leaves one of the two.

    Args:
        path: the record.
        step: the checkpoint's step, whose lines were on disk before it; -1 keeps nothing.

    Raises:
        InputError: the record ends before that step, or is damaged.
        TrainingError: the new file cannot be written.
    """
    lines = [(line, written_at(record)) for line, record in _whole_lines(path)]
    kept = [(line, written) for line, written in lines if written <= step]
    last = max((written for _, written in kept), default=0)
    if last < step:
        raise InputError(
            f"{path} ends at step {last:,}, but the checkpoint is of step {step:,}, so lines are "
            "lost; restore the file, or restart with resume=never"
        )
    content = b"".join(line for line, _ in kept)
    if path.exists() and len(content) != path.stat().st_size:
        with must_write(path):
            write_bytes(path, content)


def written_at(record: dict[str, Any]) -> int:
    """Return the step at whose end a record was written; of a decision, the one after it."""
    written: int = record.get(READ_AT, record["step"])
    return written


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Read the lines that end in a newline, with it, and their records."""
    content = read_bytes(path, hint=RESTORE) if path.exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            yield line, _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Read a line; `number` counts from the file's end if it is negative."""
    problem = "every line must be a JSON object with a step"
    try:
        record = json.loads(line)
        if is_a(int, record["step"]) and is_a(int, written_at(record)):
            problem = _wrong_type(record)
    except (ValueError, RecursionError, LookupError, TypeError):
        pass  # not JSON, not UTF-8, nested without end, or no object
    if problem:
        place = f"line {number}" if number > 0 else f"line {-number} from its end"
        raise DamagedFileError(f"{path}, {place} is damaged: {problem}; {RESTORE}")
    return record


def _wrong_type(record: dict[str, Any]) -> str:
    """Name the first field of a line that has another type than its kind's class says, if any.

    A version before may lack a field, and a number that was not finite is null.
    """
    for name, kind in _types_of(str(record.get("kind"))).items():
        value = record.get(name, MISSING)
        if value is not MISSING and not is_a(kind, value) and (kind, value) != (float, None):
            return f"{name} is {shortened(value)}"
    return ""


@cache
def _types_of(kind: str) -> dict[str, type]:
    """The types of the numbers and texts of a kind of line, by their names in the file."""
    kinds = (TrainLine, ValidationLine, NoiseLine, BatchSizeLine, ShadowLine)
    line: type[Line] | None = next((line for line in kinds if line.kind == kind), None)
    if line is None:
        return {}  # of another version
    hints = get_type_hints(line)
    return {
        line.written_as.get(entry.name, entry.name): next(
            known for known in (int, float, str) if hints[entry.name] in (known, known | None)
        )
        for entry in fields(line)
        if entry.name != "more"
    }


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize a run from all its lines, also those written before it was resumed.

    Args:
        records: the lines of metrics.jsonl, in order.

    Returns:
        steps, samples (sequences, images) and tokens consumed; validation_loss (the last) and
        minimum_validation_loss (nats) with the step and tokens of the first line that has it;
        tokens_per_second (median over steps: compilation and evaluation do not count); seconds
        (sum over training steps); batch_size (samples, the last). None without such a line. Of a
        run on images `samples` stands for tokens in these names, and there is maximum_accuracy.
    """
    train = [record for record in records if record.get("kind") == "train"]
    validation = [record for record in records if record.get("kind") == "validation"]
    last_step = train[-1] if train else {}
    finite = [record for record in validation if record.get("loss") is not None]
    lowest = min(finite, key=lambda record: record["loss"], default={})
    unit = unit_of(last_step)
    speeds = [r[unit.speed] for r in train if r.get(unit.speed) is not None]
    accuracies = [r["accuracy"] for r in finite if "accuracy" in r]
    return {
        "steps": last_step.get("step", 0),
        "samples": last_step.get("samples", 0),
        unit.name: last_step.get(unit.name, 0),
        "validation_loss": validation[-1].get("loss") if validation else None,
        "minimum_validation_loss": lowest.get("loss"),
        "minimum_validation_loss_step": lowest.get("step"),
        f"minimum_validation_loss_{unit.name}": lowest.get(unit.name),
        **({"maximum_accuracy": max(accuracies)} if accuracies else {}),
        unit.speed: median(speeds) if speeds else None,
        "seconds": sum(record.get("step_seconds") or 0.0 for record in train),
        "batch_size": last_step.get("batch_size"),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all."""
    write_bytes(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
