"""Files that are either whole or absent, whatever kills the process that writes them."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gns_pretrain.errors import InputError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, put it on disk, then rename it to `path`.

    A process killed at any moment leaves the old file, the new file, or no file, never a part;
    what it may leave is the temporary one, for `remove_temporaries`.
    """
    # Jobs may write the same file at once, on a node each.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Give a file this content, whole or not at all."""
    write_whole(path, lambda file: file.write(content))


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder that a setting names, and those above it; InputError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{setting}: {folder} cannot be made ({error.strerror}); name another folder"
        ) from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write in; it takes the name `folder` at the end, or vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process with the same number
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *, hint: str) -> dict[str, Any]:
    """The JSON object in `path`; InputError names the file and a hint if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {hint}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; {hint}")
    return content


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_whole` leaves in `folder` when it is killed."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the advisory lock of `folder`; yield whether it is held.

    On a file system without such locks (some parallel ones) it yields True: callers must stay
    correct without it, since everything is written beside and renamed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield take_flock(descriptor, wait=wait) is not False
    finally:
        os.close(descriptor)


def take_flock(descriptor: int, *, wait: bool) -> bool | None:
    """Take a file's lock, which the system releases when the process dies.

    Returns:
        Whether it is held: False if another process has it and `wait` is False; None on a file
        system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on disk; a rename lives in the folder, not in the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
