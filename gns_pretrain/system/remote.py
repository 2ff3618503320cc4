"""Folders of object storage, such as s3://bucket/prefix, with the methods of a local path.

universal-pathlib and fsspec do the work, and only a URL imports them. A store renames nothing, so
whoever writes a folder there writes last the file that makes it count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from gns_pretrain.errors import InputError, OneLineError, needs, one_line
from gns_pretrain.fields import at_home


def folder_at(place: str | Path, setting: str) -> Path:
    """Return a folder of this machine, or the one of a URL, which has the same methods.

    Raises:
        InputError: naming `setting` where a package for the URL is missing or its protocol unknown.
    """
    if "://" not in str(place):
        return Path(at_home(str(place)))
    with needs("remote", f"{setting}={place} needs universal-pathlib"):
        from upath import UPath
    try:
        folder = UPath(place)
        folder.fs  # noqa: B018 - imports the protocol's own package
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{setting}={place} cannot be used ({one_line(error)}); s3:// comes with pip install "
            "'gns-pretrain[remote]', other protocols with the package that fsspec names"
        ) from error
    return cast(Path, folder)


def is_remote(folder: Path) -> bool:
    """Whether `folder_at` has made it of a URL."""
    return not isinstance(folder, Path)


def listed_anew(folder: Path) -> list[Path]:
    """Return what is in a folder now, whoever wrote it: fsspec keeps what it has listed before."""
    if is_remote(folder):
        cast(Any, folder).fs.invalidate_cache()
    return list(folder.iterdir()) if folder.is_dir() else []


def remove_folder(folder: Path) -> None:
    """Delete a folder of a store with all that is in it."""
    remote = cast(Any, folder)
    remote.fs.rm(remote.path, recursive=True)


@contextmanager
def store_errors(folder: Path) -> Iterator[None]:
    """Around what uses a folder: a store's client has errors of its own, a disk has OSError."""
    try:
        yield
    except (OSError, OneLineError):
        raise
    except Exception as error:
        if not is_remote(folder):
            raise
        raise OSError(one_line(error)) from error
