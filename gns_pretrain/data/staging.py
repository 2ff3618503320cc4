"""Copies on a node's own disk: token shards and compiled kernels, once per node.

<stage_to>/<folder's name>-<hash of its meta.json>/    shards, checked by size and sha256 on the way
<stage_to>/compile-cache/                              what torch.compile has made, by its own keys

All ranks of a node call; the first one copies and the others wait for it. What an earlier job has
left there is used again.

The compile cache is copied file by file, not with torch.compiler.save_cache_artifacts: that holds
what one process has compiled, without the C++ kernels of a CPU. On two ranks it left rank 1's own
graphs cold, and of 26 s rank 0 still took 24. Another run's artifacts would replace it, whereas
files, named by the key of their content, add up.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from gns_pretrain.data.dataset import DatasetSettings
from gns_pretrain.data.settings import EMBEDDED, DataSettings
from gns_pretrain.data.shards import HINT, META_FILE, read_meta
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import (
    folder_lock,
    make_folder,
    must_write,
    named_file,
    remove_temporaries,
    sha256_of,
    write_bytes,
    write_whole,
)

AnyData = TypeVar("AnyData", bound=DatasetSettings)
CHUNK_BYTES = 2**24
COMPILE_CACHE = "compile-cache"
# The variables that torch.compile and triton read, and the folder of each.
CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def staged(settings: AnyData, *, log: Callable[[str], object] = print) -> AnyData:
    """Copy the shards to this node's own disk; return the settings with their paths there.

    Without `stage_to` the settings are returned unchanged.

    Raises:
        InputError: the disk is too small, `stage_to` names a variable that is not set, or a shard
            is not what meta.json says.
    """
    if settings.stage_to is None or not isinstance(settings, DataSettings):
        return settings
    copies = {
        part.path: str(staged_folder(settings, Path(part.path), log=log))
        for part in settings.parts
        if part.path != EMBEDDED
    }
    if not copies:
        return settings
    return dataclasses.replace(
        settings,
        path=copies.get(settings.path, settings.path),
        sources=[
            dataclasses.replace(source, path=copies.get(source.path, source.path))
            for source in settings.sources
        ],
        verify=False,
    )


def staged_folder(settings: DataSettings, source: Path, *, log: Callable[[str], object]) -> Path:
    """Copy one folder of shards, as `staged` does; return the copy."""
    assert settings.stage_to is not None
    meta = read_meta(source)
    digest = sha256_of(source / META_FILE)[:12]
    target = local_folder(settings.stage_to) / f"{source.resolve().name}-{digest}"
    make_folder(target, f"data.stage_to={settings.stage_to}")
    files = {  # sha256 of each file that the run reads, meta.json aside
        shard.file: shard.sha256
        for split in (settings.train_split, settings.validation_split)
        for shard in meta.of_split(split)
    }
    if meta.tokenizer is not None and meta.tokenizer_sha256 is not None:
        files[meta.tokenizer] = meta.tokenizer_sha256
    sizes: dict[str, int] = {}
    for name in files:
        path = named_file(name, source / META_FILE)
        if not path.is_file():
            raise InputError(f"{path} is missing, though meta.json names it; {HINT}")
        sizes[name] = path.stat().st_size

    def is_whole(name: str, verify: bool) -> bool:
        copy = target / name
        return (
            copy.is_file()
            and copy.stat().st_size == sizes[name]
            and (not verify or sha256_of(copy) == files[name])
        )

    def copy_missing(verify: bool) -> None:
        """Copy what is missing or not whole, meta.json last."""
        with folder_lock(target, wait=True):
            remove_temporaries(target)
            missing = [name for name in files if not is_whole(name, verify)]
            if missing:
                num_bytes = sum(sizes[name] for name in missing)
                free = shutil.disk_usage(target).free
                if num_bytes > free:
                    raise InputError(
                        f"data.stage_to={settings.stage_to} has {free / 1e9:.1f} GB free, the data "
                        f"needs {num_bytes / 1e9:.1f} GB; use a larger disk, or leave it out to "
                        "read data.path directly"
                    )
                began = time.perf_counter()
                for name in missing:
                    with must_write(
                        target / name, setting="data.stage_to", hint="name another folder"
                    ):
                        copy_checked(source / name, target / name, files[name])
                seconds = time.perf_counter() - began
                log(f"staged {num_bytes / 1e9:.2f} GB from {source} to {target} in {seconds:.1f} s")
            if not (target / META_FILE).exists():
                write_bytes(target / META_FILE, (source / META_FILE).read_bytes())

    copy_missing(verify=False)
    # The copy was hashed when it was made; a size that has changed since is still found. Hashing
    # again takes long, so a node's ranks do it in parallel, and only repair one after the other.
    if settings.verify and not all(is_whole(name, verify=True) for name in files):
        copy_missing(verify=True)
    return target


def local_folder(stage_to: str) -> Path:
    """Expand this node's environment in `stage_to`, such as $SLURM_TMPDIR."""
    path = os.path.expandvars(stage_to)
    if "$" in path:
        raise InputError(
            f"data.stage_to={stage_to} names a variable that is not set on this node; "
            "name a folder on its disk, such as /tmp/data"
        )
    return Path(path)


def copy_checked(source: Path, target: Path, sha256: str) -> None:
    """Copy a file whole; InputError, and no copy, if what was read has another sha256."""

    def write(file: BinaryIO) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file, CHUNK_BYTES)
        file.flush()
        if sha256_of(Path(file.name)) != sha256:
            raise InputError(
                f"{source} was altered: its sha256 is not the one in meta.json; {HINT}"
            )

    write_whole(target, write)


@contextmanager
def compile_cache(
    shared: str | None,
    stage_to: str | None,
    *,
    keep: bool,
    log: Callable[[str], object] = print,
) -> Iterator[None]:
    """Compile within a folder that is kept between starts.

    Args:
        shared: the folder; None leaves all to torch.
        stage_to: as in `staged`; None works in the shared folder itself.
        keep: whether this process copies what is new back to the shared folder.
        log: reports that nothing could be copied back: the run itself is done by then.
    """
    if shared is None:
        yield
        return
    local = Path(shared)
    if stage_to:
        local = local_folder(stage_to) / COMPILE_CACHE
        make_folder(local, f"data.stage_to={stage_to}")
        if local.stat().st_uid != os.getuid():  # what it holds would be executed
            raise InputError(
                f"data.stage_to={stage_to}: {local} belongs to another user; name another folder"
            )
        with folder_lock(local, wait=True):
            copy_new_files(Path(shared), local)
    for variable, name in CACHE_VARIABLES.items():
        os.environ.setdefault(variable, str(local.resolve() / name))
    yield
    if keep and stage_to:
        try:
            copy_new_files(local, Path(shared))
        except (OSError, InputError) as error:
            log(f"launch.compile_cache={shared} could not take what was compiled: {error}")


def copy_new_files(source: Path, target: Path) -> None:
    """Copy the files that the target lacks."""
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        copy = target / path.relative_to(source)
        if path.is_file() and not path.name.startswith(".") and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(copy, path.read_bytes())
