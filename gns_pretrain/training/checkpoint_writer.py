"""A checkpoint's folder begun, sealed and deleted: whole or not there, on disk or in a store.

On disk it is written under another name, flushed and renamed. A store, that is a URL
(`system/remote.py`), renames nothing: there a folder counts once it has its manifest, which is
written last and deleted first.
"""

import io
import itertools
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from gns_pretrain.model.roles import unwrapped
from gns_pretrain.model.settings import OurModel, described
from gns_pretrain.system.files import as_json, flush_to_disk, sha256_of, write_bytes
from gns_pretrain.system.remote import is_remote, listed_anew, remove_folder, store_errors

MANIFEST, TRAIN_STATE = "manifest.json", "train_state.json"
MODEL, GENERATORS = "model.json", "generators.pt"
CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")


def folder_to_write(target: Path) -> Path:
    """Return where a checkpoint is written that will be `target`."""
    return target if is_remote(target) else target.with_name(f".unfinished_{target.name}")


def writer_to(folder: Path) -> FileSystemWriter:
    """Return what writes this rank's tensors into a folder."""
    # Copying ahead would use a GPU, and in another thread the first of all.
    if not is_remote(folder):
        return FileSystemWriter(folder, per_thread_copy_ahead=0)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(str(folder), per_thread_copy_ahead=0, sync_files=False)


def make_empty(folder: Path) -> None:
    """Make the folder to write in; delete what interrupted saves left."""
    remove_unfinished(folder.parent)
    if is_remote(folder):
        remove(folder)
        return
    folder.parent.mkdir(exist_ok=True)  # not its parents: a run directory may have been moved
    folder.mkdir()


def remove_unfinished(directory: Path) -> None:
    """Delete what interrupted saves left."""
    if is_remote(directory):
        for stale in listed_anew(directory):
            if CHECKPOINT_NAME.fullmatch(stale.name) and not (stale / MANIFEST).is_file():
                remove(stale)
        return
    for stale in directory.glob(".unfinished_*"):
        shutil.rmtree(stale)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write whole files by their names."""
    for name, content in files.items():
        put(folder / name, content)


def put(path: Path, content: bytes) -> None:
    """Write a file whole: a store shows it at its end, a disk once it is renamed."""
    if is_remote(path):
        path.write_bytes(content)
    else:
        write_bytes(path, content)


def digests_of(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of the files that this rank wrote.

    torch calls a rank's files `__<rank>_<n>.distcp`; the main rank writes the others.
    """
    digests = {}
    for path in sorted(listed_anew(folder)):
        match = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
        if (int(match[1]) if match else 0) == rank:
            digests[path.name] = (path.stat().st_size, sha256_of(path))
    return digests


def seal(folder: Path, digests: list[dict[str, tuple[int, str]]]) -> None:
    """Write the manifest, then flush the whole folder to disk."""
    entries = {name: entry for part in digests for name, entry in part.items()}
    put(folder / MANIFEST, as_json(entries))
    if not is_remote(folder):
        for path in [*folder.iterdir(), folder]:
            flush_to_disk(path)


def publish(unfinished: Path, target: Path) -> None:
    """Rename a complete folder into place; one of a store is there since it has its manifest."""
    if is_remote(target):
        return
    if target.exists():
        candidates = (target.with_name(f"damaged_{n}_{target.name}") for n in itertools.count(1))
        target.rename(next(path for path in candidates if not path.exists()))
    unfinished.rename(target)
    flush_to_disk(target.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, or what of it can be deleted."""
    if is_remote(checkpoint):
        with suppress(OSError), store_errors(checkpoint):
            (checkpoint / MANIFEST).unlink(missing_ok=True)  # first: the rest counts no more
            remove_folder(checkpoint)
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)


def small_files(model: nn.Module, state: dict[str, Any]) -> dict[str, bytes]:
    """Return what is not a sharded tensor: the run's position, the model's shape, the generators.

    By the names of their files, as they are now.
    """
    inner = unwrapped(model)
    assert isinstance(inner, OurModel)
    # All ranks are seeded alike, so one set of generators serves all.
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    stored = io.BytesIO()
    torch.save(generators, stored)
    return {
        TRAIN_STATE: as_json(state),
        MODEL: as_json(described(inner.config)),
        GENERATORS: stored.getvalue(),
    }
