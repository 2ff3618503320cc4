"""Copies on a node's own disk: token shards and compiled kernels, once a node.

<stage_to>/<folder's name>-<hash of its meta.json>/    shards, checked by size and sha256 on the way
<stage_to>/compile-cache/                              what torch.compile has made, by its own keys

All ranks of a node call; the first one copies and the others wait for it. What an earlier job has
left there is used again.
"""

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gns_pretrain.data.settings import EMBEDDED, DataSettings
from gns_pretrain.data.shards import META_FILE, CorpusMeta, read_meta
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import (
    folder_lock,
    make_folder,
    remove_temporaries,
    sha256_of,
    write_bytes,
    write_whole,
)

CHUNK_BYTES = 2**24
COMPILE_CACHE = "compile-cache"
# What torch.compile and triton look at, and the folder of each.
CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def staged(settings: DataSettings, *, say: Callable[[str], object] = print) -> DataSettings:
    """The same settings with `path` on this node's own disk; as they are without `stage_to`.

    Raises:
        InputError: the disk is too small, `stage_to` names a variable that is not set, or a shard
            is not what meta.json says.
    """
    if settings.stage_to is None or settings.path == EMBEDDED:
        return settings
    source = Path(settings.path)
    meta = read_meta(source)
    mark = sha256_of(source / META_FILE)[:12]
    target = local_folder(settings.stage_to) / f"{source.resolve().name}-{mark}"
    make_folder(target, f"data.stage_to={settings.stage_to}")
    wanted = files_of(meta, settings)

    def is_whole(name: str) -> bool:
        return same_size(source / name, target / name)

    def is_same(name: str) -> bool:
        return is_whole(name) and sha256_of(target / name) == wanted[name]

    with folder_lock(target, wait=True):
        copy_files(source, target, wanted, settings, keep=is_whole, say=say)
    # The copy was hashed when it was made; a size that has changed since is still found. Looking
    # for more takes long, so a node's ranks do it side by side and mend one after the other.
    if settings.verify and not all(map(is_same, wanted)):
        with folder_lock(target, wait=True):
            copy_files(source, target, wanted, settings, keep=is_same, say=say)
    return dataclasses.replace(settings, path=str(target), verify=False)


def local_folder(stage_to: str) -> Path:
    """`stage_to` with this node's environment in it, such as $SLURM_TMPDIR."""
    path = os.path.expandvars(stage_to)
    if "$" in path:
        raise InputError(
            f"data.stage_to={stage_to} names a variable that is not set on this node; "
            "name a folder on its disk, such as /tmp/data"
        )
    return Path(path)


def files_of(meta: CorpusMeta, settings: DataSettings) -> dict[str, str]:
    """The sha256 of each file that a run reads, meta.json aside."""
    wanted = {
        shard.file: shard.sha256
        for split in (settings.train_split, settings.validation_split)
        for shard in meta.of_split(split)
    }
    if meta.tokenizer_sha256 is not None and meta.tokenizer is not None:
        wanted[meta.tokenizer] = meta.tokenizer_sha256
    return wanted


def copy_files(
    source: Path,
    target: Path,
    wanted: dict[str, str],
    settings: DataSettings,
    *,
    keep: Callable[[str], bool],
    say: Callable[[str], object],
) -> None:
    """Copy what is not there yet, meta.json last; the caller holds the target's lock.

    Args:
        wanted: sha256 of each file, by its name.
        keep: whether a file that is there may stay.
    """
    remove_temporaries(target)
    missing = [name for name in wanted if not keep(name)]
    if missing:
        num_bytes = sum(size_of(source / name) for name in missing)
        require_space(target, num_bytes, settings.stage_to)
        began = time.perf_counter()
        for name in missing:
            copy_checked(source / name, target / name, wanted[name])
        seconds = time.perf_counter() - began
        say(f"staged {num_bytes / 1e9:.2f} GB from {source} to {target} in {seconds:.1f} s")
    if not (target / META_FILE).exists():
        write_bytes(target / META_FILE, (source / META_FILE).read_bytes())


def copy_checked(source: Path, target: Path, sha256: str) -> None:
    """Copy a file whole and compare what was read with its sha256.

    Raises:
        InputError: it is another one; the target is not made.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for chunk in chunks(source):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{source} was altered: its sha256 is not the one in meta.json; restore the file "
                "or prepare the folder again"
            )

    write_whole(target, write)


def chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a part at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def same_size(source: Path, target: Path) -> bool:
    """Whether the copy is there and as long as the original."""
    return target.is_file() and target.stat().st_size == size_of(source)


def size_of(path: Path) -> int:
    """Bytes of a file that has to be there."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing, though meta.json names it; restore the file or prepare the "
            "folder again"
        )
    return path.stat().st_size


def require_space(folder: Path, num_bytes: int, stage_to: str | None) -> None:
    """Refuse to begin a copy that cannot be finished."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"data.stage_to={stage_to} has {free / 1e9:.1f} GB free, the data needs "
            f"{num_bytes / 1e9:.1f} GB; use a larger disk, or leave it out to read "
            "data.path directly"
        )


@contextmanager
def compile_cache(
    shared: str | None,
    stage_to: str | None,
    *,
    keep: bool,
    say: Callable[[str], object] = print,
) -> Iterator[None]:
    """Compile within a folder that is kept between starts.

    Args:
        shared: the folder; None leaves all to torch.
        stage_to: as in `staged`; None works in the shared folder itself.
        keep: whether this process takes what was new back to the shared folder.
        say: prints a line, as where nothing can be taken back: the run itself is done by then.
    """
    if shared is None:
        yield
        return
    local = stage_compile_cache(Path(shared), stage_to) if stage_to else Path(shared)
    for variable, name in CACHE_VARIABLES.items():
        os.environ.setdefault(variable, str(local.resolve() / name))
    yield
    if keep and stage_to:
        try:
            copy_new_files(local, Path(shared))
        except (OSError, InputError) as error:
            say(f"launch.compile_cache={shared} could not take what was compiled: {error}")


def stage_compile_cache(shared: Path, stage_to: str) -> Path:
    """A folder on this node's disk with what earlier starts have compiled."""
    local = local_folder(stage_to) / COMPILE_CACHE
    make_folder(local, f"data.stage_to={stage_to}")
    with folder_lock(local, wait=True):
        copy_new_files(shared, local)
    return local


def copy_new_files(source: Path, target: Path) -> int:
    """Copy the files that the target lacks, each compared with its sha256; returns their number.

    Files of a compile cache are named by their content's key, so one that is there is the same.
    """
    copied = 0
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        copy = target / path.relative_to(source)
        if path.is_file() and not path.name.startswith(".") and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_checked(path, copy, sha256_of(path))
            copied += 1
    return copied
