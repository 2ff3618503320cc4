"""Read what torch.distributed.checkpoint wrote without executing anything that it holds.

Its `.metadata` is a pickle, and its planner unpickles whatever is no tensor, so that by themselves
both run the code of whoever made the checkpoint. Here only its own classes and plain values load.
"""

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

from gns_pretrain.system.remote import is_remote

METADATA = ".metadata"
KNOWN = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.StorageMeta,
        dcp.TensorProperties,
        dcp.TensorStorageMetadata,
        dcp._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
        pathlib.PosixPath,
    )
} | {("pathlib", "PosixPath"): pathlib.PosixPath}  # Python 3.13 has it in pathlib._local


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes of a checkpoint's metadata and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a known class; UnpicklingError names any other."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it calls {module}.{name}, as no checkpoint of torch does")


class DataOnlyReader(FileSystemReader):
    """Reads a checkpoint, of a disk or a store, whose metadata is a stranger's."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint
        if is_remote(checkpoint):
            from torch.distributed.checkpoint._fsspec_filesystem import FileSystem

            self.fs = FileSystem()  # type: ignore[assignment]
            self.path = self.fs.init_path(str(checkpoint))

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """Unpickle the metadata; UnpicklingError if it is anything else, or names other files."""
        path = self.checkpoint / METADATA
        try:
            with path.open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            storage = {**metadata.storage_data}.values()
            named = {part.relative_path for part in storage}
            transformed = any(part.transform_descriptors for part in storage)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # bytes that are no pickle raise nearly anything
            raise pickle.UnpicklingError(f"not the metadata of a checkpoint ({error!r})") from error
        if not isinstance(metadata, dcp.Metadata) or transformed:
            raise pickle.UnpicklingError("not metadata as this program writes it")
        if foreign := named - {file.name for file in path.parent.glob("*.distcp")}:
            raise pickle.UnpicklingError(f"it names {min(map(repr, foreign))}, which is not beside")
        metadata.storage_meta = dcp.StorageMeta(load_id=self.load_id)
        return metadata


class DataOnlyPlanner(DefaultLoadPlanner):
    """Loads numbers, texts and containers of them beside the tensors, and refuses anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand on only what loads with weights_only: the base class unpickles what it is given."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def metadata_problem(checkpoint: Path) -> str | None:
    """Return why a checkpoint's metadata must not be used, None if it may be."""
    try:
        DataOnlyReader(checkpoint).read_metadata()
    except (OSError, pickle.UnpicklingError) as error:
        return f"{METADATA} is refused: {error}"
    return None
