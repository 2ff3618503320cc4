"""The run record on disk: one JSON object a line, written through, cut back on resume.

A line is whole once its newline is there: what follows the last newline is a torn write.
"""

import json
import os
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.files import write_bytes

TAIL_BYTES = 2**16  # hold many lines


class JsonLines:
    """Appends records to a file; a record that was written survives a kill of this process.

    Every record goes to the operating system at once, whole and in one call. There is no buffer
    in this process that a kill could lose, and no second process that could interleave a line.

    Args:
        path: The file; its folder must exist. An existing file is appended to.

    Raises:
        InputError: The file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor: int | None = os.open(
                path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
            )
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}); "
                f"choose another run_name or mend the folder's permissions"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Floats keep every bit: Python's shortest exact decimal form.

        Raises:
            TrainingError: The disk is full or gone. A torn line may stay; resuming drops it.
        """
        assert self._descriptor is not None, "written to after close()"
        text = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        remaining = memoryview(text.encode())
        try:
            # A write may be cut short by a signal or a nearly full disk; the rest follows.
            while remaining:
                remaining = remaining[os.write(self._descriptor, remaining) :]
        except OSError as error:
            raise TrainingError(
                f"{self._path}: the line of step {record.get('step')} could not be written "
                f"({error.strerror}); saved checkpoints are good, mend the disk and start "
                f"the same command again"
            ) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, in order, without a torn last line; empty where there is no file.

    Raises:
        InputError: A whole line is not a JSON object with an integer "step".
    """
    return [_parse(path, number, line) for number, line in enumerate(_whole_lines(path), start=1)]


def last_record(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The last whole record (of a kind), from the end of a long file; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(-min(size, TAIL_BYTES), os.SEEK_END)
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is torn
    except OSError:
        return {}
    # The tail begins in the middle of a line.
    records = (_parse(path, -1, line) for line in reversed(lines[size > TAIL_BYTES :]))
    return next((record for record in records if kind in (None, record.get("kind"))), {})


def truncate_after_step(path: Path, step: int) -> None:
    """Keep the lines whose "step" is at most `step`, byte for byte; drop a torn last line.

    A resumed run repeats the steps after its checkpoint; their old lines would stand there
    twice. The new file is written beside and renamed, so that a kill leaves one of the two.

    Args:
        path: The record; nothing happens where there is none.
        step: The checkpoint's step; -1 keeps nothing.

    Raises:
        InputError: A whole line is not a JSON object with an integer "step".
    """
    if not path.exists():
        return
    kept = b"".join(
        line
        for number, line in enumerate(_whole_lines(path), start=1)
        if _parse(path, number, line)["step"] <= step
    )
    if len(kept) != path.stat().st_size:
        write_bytes(path, kept)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline, with it."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(
            f"{path}, line {number} is damaged: every line must be a JSON object with a step; "
            f"restore the file, or start over with resume=never"
        )
    return record
