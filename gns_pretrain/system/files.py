"""Files that are either whole or absent, whatever kills the process that writes them."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    BinaryIO,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from gns_pretrain.errors import DamagedFileError, InputError, TrainingError
from gns_pretrain.fields import LARGEST_INTEGER
from gns_pretrain.system.remote import is_remote

T = TypeVar("T")
MAX_NAME = 255  # bytes of a file's name


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, put it on disk, then rename it to `path`.

    A process killed at any moment leaves the old file, the new file, or no file, never a part;
    what it may leave is the temporary one, for `remove_temporaries`.
    """
    # Jobs may write the same file at once, on a node each.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same number
        with temporary.open("xb") as file:  # never through somebody else's link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None  # the name that the user knows
        raise
    flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Give a file this content, whole or not at all."""
    write_whole(path, lambda file: file.write(content))


@contextlib.contextmanager
def must_write(path: Path, *, setting: str = "", hint: str | None = None) -> Iterator[None]:
    """Around writing what a command cannot do without: an OSError becomes one line.

    Args:
        path: what is written, where the error does not say.
        setting: that names it, if one does.
        hint: what to do about an error other than a full disk, which is then an InputError; None
            where the path was fine when the command began.

    Raises:
        TrainingError: the disk is full, or there is no hint.
        InputError: anything else, with the hint.
    """
    try:
        yield
    except OSError as error:
        named = f"{setting}: " if setting else ""
        line = f"{named}{error.filename or path} cannot be written ({error.strerror or error})"
        if hint is not None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{line}; {hint}") from error
        raise TrainingError(
            f"{line}; make room or mend the path, and start the same command again"
        ) from error


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder that a setting names, and those above it; as `must_write` if that cannot be."""
    with must_write(folder, setting=setting, hint="name another folder"):
        folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path, setting: str) -> None:
    """Refuse what `make_folder` would refuse, as far as it shows without making anything."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with must_write(folder, setting=setting, hint="name another folder"):
        for is_fine, code in (
            (nearest.is_dir(), errno.ENOTDIR),
            (os.access(nearest, os.W_OK), errno.EACCES),
        ):
            if not is_fine:
                raise OSError(code, os.strerror(code), str(folder))


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write in; it takes the name `folder` at the end, or vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.unfinished-{socket.gethostname()}-"
    for stale in folder.parent.glob(glob.escape(prefix) + "*"):
        process = stale.name.removeprefix(prefix)
        if process.isdecimal() and not is_alive(int(process)):
            shutil.rmtree(stale, ignore_errors=True)
    unfinished = folder.with_name(f"{prefix}{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process with the same number
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there, whoever's it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON, whole or not at all."""
    write_bytes(path, as_json(content))


def as_json(content: dict[str, Any]) -> bytes:
    """The bytes of `content` as indented JSON."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; OSError for a folder, and for a pipe, whose reader may wait for ever."""
    if is_remote(path):
        return path.open("rb")
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_bytes(path: Path, *, hint: str) -> bytes:
    """The content of a file; DamagedFileError names it and a hint if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        reason = error.strerror or error
        raise DamagedFileError(f"{path} cannot be read ({reason}); {hint}") from error


def read_json(path: Path, *, hint: str) -> dict[str, Any]:
    """The JSON object in `path`; DamagedFileError names the file and a hint if it is not one."""
    content = read_bytes(path, hint=hint)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not valid JSON ({error}); {hint}") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} is not a JSON object; {hint}")
    return values


def read_lines(path: Path, kind: type) -> list[dict[str, Any]]:
    """The JSON objects of a file to which processes append a line each, in order.

    What a kill or a full disk has cut off is left out, and the line that the next process appended
    to it: whatever lacks entries of the dataclass `kind`, or has other types in them.

    Raises:
        DamagedFileError: the file is there and cannot be read.
    """
    found = []
    for line in read_bytes(path, hint="remove it").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            parse(kind, values, source=path, hint="")
            found.append(values)
    return found


def parse(kind: type[T], content: Any, *, source: Path, hint: str) -> T:
    """Make a dataclass, and those in its fields, of what JSON has for it; other entries are left.

    Raises:
        DamagedFileError: naming `source`, the file, and the entry that is missing or has another
            type than its field.
    """
    try:
        made: T = _converted(content, kind)
    except KeyError as error:
        raise DamagedFileError(f"{source} lacks the entry {error}; {hint}") from error
    except TypeError as error:
        raise DamagedFileError(
            f"{source} holds an entry of the wrong type, {error}; {hint}"
        ) from error
    return made


def _converted(value: Any, wanted: Any) -> Any:
    """Convert one value; KeyError for a field without an entry, TypeError for another type."""
    origin: Any = get_origin(wanted) or wanted
    inner = get_args(wanted)
    if origin is Annotated:
        return _converted(value, inner[0])
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _converted(value, next(one for one in inner if one is not NoneType))
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_converted(each, inner[0]) for each in value)
    if origin is dict and isinstance(value, dict):
        return {name: _converted(each, inner[1]) for name, each in value.items()}
    if is_dataclass(origin) and isinstance(value, dict):
        types, values = get_type_hints(origin), {}
        for entry in fields(origin):
            if entry.name in value:
                values[entry.name] = _converted(value[entry.name], types[entry.name])
            elif entry.default is MISSING and entry.default_factory is MISSING:
                raise KeyError(entry.name)
        return cast(Any, origin)(**values)
    if origin is Any or is_a(origin, value):
        return value
    raise TypeError(f"{shortened(value)} for {getattr(origin, '__name__', origin)}")


def is_a(kind: type, value: Any) -> bool:
    """Whether a value from a file is of a type; a float may have been written as an integer.

    Python's JSON and YAML read numbers that no computation takes: infinities, NaN, and integers of
    more than 64 bits.
    """
    if kind is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    is_one: bool = type(value) is kind
    return is_one and (kind is not int or abs(value) <= LARGEST_INTEGER)


def shortened(value: Any) -> str:
    """The value as an error shows it, however long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def named_file(name: Any, source: Path, *, root: Path | None = None) -> Path:
    """Return the path of a file that another one names, beside it.

    Args:
        name: as `source` holds it; not to be trusted.
        source: the file that holds it.
        root: the folder that links must not leave; by default that of `source`.

    Raises:
        InputError: it is anything but the name of a file of that folder, or a link out of it.
    """
    folder = source.parent
    is_name = isinstance(name, str) and name == Path(name).name and name not in ("", "..")
    if not is_name or "\0" in name or len(name.encode(errors="replace")) > MAX_NAME:
        raise InputError(
            f"{source} names the file {shortened(name)}, which is not a name inside its folder; "
            "use a folder from somebody you trust"
        )
    path = folder / name
    if path.is_symlink():  # a store has none
        # Not Path.resolve, which raises a RuntimeError where links lead in a circle.
        real = Path(os.path.realpath(path))
        if real.is_relative_to(os.path.realpath(root or folder)):
            return path
        raise InputError(
            f"{path} is a link to a file outside of its folder; put the file itself there"
        )
    return path


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
