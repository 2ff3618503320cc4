"""Checkpoints found, compared with their manifest and loaded, without executing what they hold.

torch's `.metadata` is a pickle, and its planner unpickles whatever is no tensor, so that by
themselves both run the code of whoever made the checkpoint. Here only its own classes and plain
values load.
"""

import io
import pathlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gns_pretrain.errors import InputError, one_line
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.kinds import MODELS
from gns_pretrain.model.llama import Llama
from gns_pretrain.model.settings import KIND, ModelSettings
from gns_pretrain.optim.averaging import averaged_weights, two_faced
from gns_pretrain.parallel.mesh import World
from gns_pretrain.system.files import named_file, parse, read_json, sha256_of
from gns_pretrain.system.remote import is_remote, listed_anew, store_errors
from gns_pretrain.training.checkpoint_writer import (
    CHECKPOINT_NAME,
    GENERATORS,
    MANIFEST,
    MODEL,
    TRAIN_STATE,
)

METADATA = ".metadata"


def memory_format(encoding: Any, name: str) -> Any:
    """Stand for `getattr`, by which Python 3.11.0 to 3.11.3 pickles the member of an enum.

    Returns:
        The member of the one enum that metadata has; UnpicklingError for an attribute of any other.
    """
    if encoding is not metadata._MEM_FORMAT_ENCODING or name not in encoding.__members__:
        raise pickle.UnpicklingError("it calls builtins.getattr, as no checkpoint of torch does")
    return encoding[name]


KNOWN = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
        pathlib.PosixPath,
    )
} | {
    ("pathlib", "PosixPath"): pathlib.PosixPath,  # Python 3.13 has it in pathlib._local
    ("builtins", "getattr"): memory_format,
}


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

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Unpickle the metadata; UnpicklingError if it is anything else, or names other files."""
        path = self.checkpoint / METADATA
        try:
            with path.open("rb") as file:
                found = MetadataUnpickler(file).load()
            storage = {**found.storage_data}.values()
            named = {part.relative_path for part in storage}
            transformed = any(part.transform_descriptors for part in storage)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # bytes that are no pickle raise nearly anything
            raise pickle.UnpicklingError(f"not the metadata of a checkpoint ({error!r})") from error
        if not isinstance(found, metadata.Metadata) or transformed:
            raise pickle.UnpicklingError("not metadata as this program writes it")
        if foreign := named - {file.name for file in path.parent.glob("*.distcp")}:
            raise pickle.UnpicklingError(f"it names {min(map(repr, foreign))}, which is not beside")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


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


def load_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    hyperparameters: bool = True,
) -> dict[str, Any]:
    """Load a whole one into model, optimizer and random generators; return its further state.

    Args:
        hyperparameters: whether the optimizer takes those, too, or keeps its own.
    """
    with tensors_of(model, optimizer) as tensors:
        own = {} if hyperparameters else {"param_groups": tensors["optimizer"].pop("param_groups")}
        load_tensors(tensors, checkpoint, world)
        tensors["optimizer"].update(own)
        set_model_state_dict(model, tensors["model"])
        # Not strict, because a rule without momentum has no state for its parameters; nothing can
        # be missing, since dcp.load was asked for every tensor of this optimizer.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=options)
    restore_generators(checkpoint)
    return read_json(checkpoint / TRAIN_STATE, hint="use an older checkpoint")


def load_model(checkpoint: Path) -> Llama:
    """Load a checkpoint's model on the CPU in float32; InputError if it is not whole."""
    with reachable(checkpoint):
        reason = damage(checkpoint)
    if reason:
        raise InputError(f"{checkpoint} is not a whole checkpoint ({reason}); name a step_* folder")
    return read_model(checkpoint)


def read_model(checkpoint: Path) -> Llama:
    """Load the model of a checkpoint that is known to be whole, on the CPU in float32."""
    model = Llama(stored_llama(checkpoint))
    tensors = {"model": model.state_dict()}
    load_tensors(tensors, checkpoint)
    model.load_state_dict(tensors["model"])
    return model


def stored_model(checkpoint: Path) -> ModelSettings:
    """Read model.json; InputError if it is damaged."""
    path = checkpoint / MODEL
    values = read_json(path, hint="restore it")
    kind = values.pop(KIND, LlamaConfig.kind)
    if kind not in MODELS:
        raise InputError(f"{path} describes a model of the unknown kind {kind}; restore it")
    return parse(MODELS[kind], values, source=path, hint="restore it")


def stored_llama(checkpoint: Path) -> LlamaConfig:
    """Read model.json of a Llama; InputError for any other model, or if it is damaged, or describes
    more weights than are stored.
    """
    path, config = checkpoint / MODEL, stored_model(checkpoint)
    if not isinstance(config, LlamaConfig):
        raise InputError(
            f"{checkpoint} holds {config.name}, a model of images, and this reads a Llama; name a "
            "checkpoint of one"
        )
    num_bytes = 4 * count_parameters(config).total  # weights are stored in float32
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    if num_bytes > stored:
        raise InputError(
            f"{path} describes weights of {num_bytes:,} bytes, but the checkpoint holds "
            f"{stored:,}; restore it"
        )
    return config


def restore_generators(checkpoint: Path) -> None:
    """Set torch's random generators, by kind of device; InputError for what is no state of one."""
    path = checkpoint / GENERATORS
    try:
        generators = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        torch.set_rng_state(generators["cpu"])
        # A kind of device that was not saved keeps its own.
        if "cuda" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["cuda"])
    except Exception as error:  # bytes that are none raise nearly anything
        raise InputError(
            f"{path} is refused ({one_line(error)[:200]}); use an older checkpoint",
            on_all_ranks=True,
        ) from error


@contextmanager
def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[dict[str, dict[str, Any]]]:
    """What torch.distributed.checkpoint writes inside the block, and reads into.

    "model" has the weights that are evaluated, so that whatever reads a model reads those. An
    average keeps the training weights in its state; another optimizer's stand beside it.
    """
    if two_faced(optimizer):
        get_optimizer_state_dict(model, optimizer)  # its first state is made by a step: in training
    with averaged_weights(model, optimizer) as kept:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        more = {"training_weights": kept} if kept else {}
        yield {"model": model_state, "optimizer": optimizer_state, **more}


def load_tensors(tensors: dict[str, Any], checkpoint: Path, world: World | None = None) -> None:
    """Fill tensors from a checkpoint; InputError, on all ranks, if they are not what it holds."""
    reader, planner = DataOnlyReader(checkpoint), DataOnlyPlanner()
    try:
        alone = is_alone(world)
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise InputError(
            f"{checkpoint} cannot be loaded ({root_cause(error)}); use an older checkpoint",
            on_all_ranks=True,
        ) from error


def is_alone(world: World | None) -> bool:
    """Return whether dcp runs without a process group, and silence its warning that it does."""
    # For good: a block with filters of its own would be every thread's.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return world is None or world.mesh is None


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return all checkpoints, newest first, without unfinished ones."""
    found = [
        (int(match[1]), path)
        for path in listed_anew(directory)
        if (match := CHECKPOINT_NAME.fullmatch(path.name))
        and (path / MANIFEST if is_remote(path) else path).exists()
        and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


@contextmanager
def reachable(directory: Path) -> Iterator[None]:
    """Around the first use of a store: an InputError, one line, if it does not answer as asked."""
    try:
        with store_errors(directory):
            yield
    except OSError as error:
        if not is_remote(directory):
            raise
        raise InputError(
            f"{directory} cannot be read ({one_line(error)}); check the name, the credentials and "
            "the endpoint"
        ) from error


def pick_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for folder in checkpoint_folders(directory):
        reason = damage(folder)
        if reason is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder} is damaged ({reason})")
    return None, damaged


def damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong, None if nothing is."""
    try:
        manifest = read_json(folder / MANIFEST, hint="restore it")
        entries = {named_file(n, folder / MANIFEST): (s, d) for n, (s, d) in manifest.items()}
    except (InputError, TypeError, ValueError) as error:
        return f"{MANIFEST} is missing or damaged: {one_line(error)}"
    needed = {folder / name for name in (METADATA, TRAIN_STATE, MODEL, GENERATORS)}
    for path in sorted((needed | set(folder.glob("*.distcp"))) - entries.keys()):
        return f"{path.name} is not in {MANIFEST}"
    for path, (size, sha256) in entries.items():
        name = path.name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256_of(path) != sha256:
            return f"{name} has changed since it was written: its sha256 differs"
    return metadata_problem(folder) or misnamed(folder)


def misnamed(folder: Path) -> str | None:
    """Return what a checkpoint holds if its folder is called by another step, else None."""
    try:
        step = read_json(folder / TRAIN_STATE, hint="restore it").get("step")
    except InputError as error:
        return str(error)
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    if match and int(match[1]) != step:
        return f"it holds step {step}, so its folder was renamed"
    return None


def root_cause(error: BaseException) -> str:
    """Return one line for what stopped a save: torch wraps each rank's error in its own."""
    if isinstance(error, CheckpointException):
        error = next((wrapped[0] for wrapped in error.failures.values()), error)
    while error.__cause__ is not None:
        error = error.__cause__
    line = one_line(error)
    if "inline_container" in line:  # where torch.save writes; it does not say why that failed
        line = f"the disk is full or fails, torch says {line}"
    return line
