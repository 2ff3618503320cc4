"""Checkpoints that load on any layout, and that say when a byte of them has changed.

A checkpoint is a folder `step_00001200/`: torch.distributed.checkpoint's files, `train_state.json`,
`model.json`, and `manifest.json` with the size and sha256 of each. It is written under another name
and renamed when all of it is on disk, so a folder with that name is whole.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.collectives import from_main, gathered
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import unwrapped
from gns_pretrain.system.files import flush_to_disk, sha256_of, write_json
from gns_pretrain.training.state import TrainState

# The folder of a checkpoint on disk: written beside, sealed with sums of its own, then renamed.
#
# torch.distributed.checkpoint loads a flipped byte without a word; the manifest does not.

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


TRAIN_STATE, MODEL, GENERATORS = "train_state.json", "model.json", "generators.pt"
# torch's own is a BaseException; it holds what each rank met.
SAVE_ERRORS = (OSError, RuntimeError, CheckpointException)


@dataclass
class CheckpointSettings:
    """How often a run saves itself, and how much it keeps."""

    every_steps: int = 100  # optimizer steps; also at the end and when asked to stop
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        if self.every_steps < 1:
            raise InputError(
                f"checkpoint.every_steps={self.every_steps} must be at least 1 step; "
                "a number larger than the run's steps saves only at its end"
            )
        if self.keep < 1:
            raise InputError(
                f"checkpoint.keep={self.keep} must be at least 1; 2 survive a bad disk"
            )


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: `outputs/<run_name>/checkpoints`; made when the first is saved.
        keep: newest ones that stay.
        world: all its ranks call `save` and `load_latest` together.
    """

    def __init__(self, directory: Path, *, keep: int, world: World) -> None:
        self.directory = directory
        self.keep = keep
        self.world = world

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        *others: Stateful,
    ) -> Path:
        """Write a checkpoint of this step; older ones beyond `keep` go when it stands.

        Args:
            model: parallelized.
            optimizer: over its parameters.
            state: of the run.
            others: further parts of the run, whose `state_dict` is fit for JSON and written beside
                the state's own entries.

        Raises:
            TrainingError: it could not be written; what was there before still is.
        """
        target = self.directory / f"step_{state.step:08d}"
        if from_main(self.world.is_main and damage(target) is None, self.world):
            return target
        unfinished = self.directory / f".unfinished_{target.name}"
        try:
            self._main(lambda: prepare(unfinished))
            with alone(self.world) as no_dist:
                tensors = tensors_to_save(model, optimizer)
                dcp.save(tensors, checkpoint_id=unfinished, no_dist=no_dist)
            self._main(lambda: write_state(unfinished, model, state, *others))
            # Each rank reads back its own files: the hash covers what the disk holds.
            hashes = self._each(lambda: digests_of(unfinished, self.world.rank))
            self._main(lambda: seal(unfinished, hashes))
            self._main(lambda: publish(unfinished, target))
        except SAVE_ERRORS as error:
            if self.world.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise TrainingError(
                f"step {state.step}: the checkpoint {target} could not be written "
                f"({root_cause(error)}); {self._what_is_left()}",
                on_all_ranks=True,
            ) from error
        if self.world.is_main:
            self._prune(target)
        return target

    def _main(self, action: Callable[[], None]) -> None:
        """Do something on the main rank alone; its failure is raised on every rank."""
        self._each(lambda: action() if self.world.is_main else None)

    def _each(self, action: Callable[[], Any]) -> list[Any]:
        """Do something on each rank; what each got, or the first one's failure, on every rank."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = str(error)
        found = gathered((result, problem), self.world)
        for _, problem in found:
            if problem is not None:
                raise OSError(problem)
        return [result for result, _ in found]

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the newest `keep`, counted from the one just written.

        A folder of a later step is one that the run could not load, and counts for nothing. What
        cannot be deleted now (a file still open on NFS) is tried again after the next save.
        """
        folders = checkpoint_folders(self.directory)
        for old in folders[folders.index(newest) + self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _what_is_left(self) -> str:
        whole, _ = pick_whole(self.directory)
        way_out = "make room or mend the path, and start the same command again"
        if whole is None:
            return f"there is no older one; {way_out}"
        return f"{whole} is whole and is where a run goes on; {way_out}"

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Stateful
    ) -> tuple[TrainState | None, list[str]]:
        """Load the newest whole checkpoint into model, optimizer, others and generators.

        Returns:
            The state it was saved with, None where there is no checkpoint; and a line for each
            damaged one that was passed over.

        Raises:
            TrainingError: there are checkpoints and every one is damaged.
        """
        found = pick_whole(self.directory) if self.world.is_main else None
        chosen, damaged = from_main(found, self.world)
        if chosen is None:
            if damaged:
                raise TrainingError(
                    f"{'; '.join(damaged)}; no whole checkpoint is left in {self.directory}: "
                    "restore one, or start over with resume=never",
                    on_all_ranks=True,
                )
            return None, []
        tensors = tensors_to_save(model, optimizer)
        with alone(self.world) as no_dist:
            dcp.load(tensors, checkpoint_id=chosen, no_dist=no_dist)
        set_model_state_dict(model, tensors["model"])
        # Not strict, because a rule without momentum has no state for its parameters; that nothing
        # is missing was seen to when reading, where every tensor of this optimizer was asked for.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=options)
        restore_generators(torch.load(chosen / GENERATORS, weights_only=True))
        values = json.loads((chosen / TRAIN_STATE).read_text())
        for other in others:
            other.load_state_dict(values)
        return TrainState.from_dict(values), damaged


@contextmanager
def alone(world: World | None = None) -> Iterator[bool]:
    """Whether a save or load takes place without other ranks; torch then warns that it does."""
    no_dist = world is None or world.mesh is None
    with warnings.catch_warnings():
        if no_dist:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield no_dist


def tensors_to_save(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads into."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def generator_states() -> dict[str, torch.Tensor]:
    """States of torch's default generators; all ranks are seeded alike, so one set serves all."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    """Inverse of `generator_states`; a kind of device that was not saved keeps its own."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_state(folder: Path, model: nn.Module, state: TrainState, *others: Stateful) -> None:
    """What is not a sharded tensor: the run's position, the model's shape, the generators."""
    values = state.as_dict()
    for other in others:
        values |= other.state_dict()
    write_json(folder / TRAIN_STATE, values)
    write_json(folder / MODEL, asdict(unwrapped(model).config))
    torch.save(generator_states(), folder / GENERATORS)


def load_model(checkpoint: Path) -> Llama:
    """The model of a checkpoint folder, on the CPU in float32; needs no other rank.

    Raises:
        InputError: the folder is not a whole checkpoint.
    """
    reason = damage(checkpoint)
    if reason:
        raise InputError(f"{checkpoint} is not a whole checkpoint ({reason}); name a step_* folder")
    values = json.loads((checkpoint / MODEL).read_text())
    scaling = RopeScaling(**values.pop("rope_scaling"))
    model = Llama(LlamaConfig(**values, rope_scaling=scaling))
    tensors = {"model": model.state_dict()}
    with alone() as no_dist:
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    model.load_state_dict(tensors["model"])
    return model


def root_cause(error: BaseException) -> str:
    """One line for what stopped a save: torch wraps each rank's error in its own."""
    if isinstance(error, CheckpointException):
        error = next((wrapped[0] for wrapped in error.failures.values()), error)
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
