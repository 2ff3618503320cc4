"""The folder of a checkpoint on disk: written beside, sealed with sums of its own, then renamed.

torch.distributed.checkpoint loads a flipped byte without a word; the manifest does not.
"""

import json
import re
import shutil
from pathlib import Path

from gns_pretrain.files import flush_to_disk, sha256_of, write_json

MANIFEST = "manifest.json"
FOLDER = re.compile(r"step_(\d{8,})")


def prepare(folder: Path) -> None:
    """An empty folder to write in; what an interrupted save left goes."""
    for stale in folder.parent.glob(".unfinished_*"):
        shutil.rmtree(stale)
    folder.mkdir(parents=True)


def digests_of(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Size and sha256 of the files that this rank wrote."""
    return {
        path.name: digest(path) for path in sorted(folder.iterdir()) if owner_of(path.name) == rank
    }


def seal(folder: Path, digests: list[dict[str, tuple[int, str]]]) -> None:
    """Write the manifest and wait until all of the folder is on the disk."""
    manifest = {name: entry for part in digests for name, entry in part.items()}
    write_json(folder / MANIFEST, manifest)
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)


def checkpoint_folders(directory: Path) -> list[Path]:
    """All checkpoints, newest first; unfinished ones do not count."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if path.is_dir() and (match := FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def pick_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for folder in checkpoint_folders(directory):
        reason = damage(folder)
        if reason is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder} is damaged ({reason})")
    return None, damaged


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is.

    torch.distributed.checkpoint loads a flipped byte without a word, hence hashes of our own.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or not JSON"
    for name, (size, sha256) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if digest(path)[1] != sha256:
            return f"{name} is not the one that was written: its sha256 differs"
    return None


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file."""
    return path.stat().st_size, sha256_of(path)


def owner_of(file_name: str) -> int:
    """The rank that wrote a file: `__<rank>_<n>.distcp` is torch's name, the rest is the main's."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", file_name)
    return int(match[1]) if match else 0


def publish(unfinished: Path, target: Path) -> None:
    """Rename a complete folder into place; a damaged one of that name is set aside, not deleted."""
    if target.exists():
        aside = next(
            path
            for n in range(1, 1000)
            if not (path := target.with_name(f"damaged_{n}_{target.name}")).exists()
        )
        target.rename(aside)
    unfinished.rename(target)
    flush_to_disk(target.parent)
