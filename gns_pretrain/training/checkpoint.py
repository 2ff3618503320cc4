"""Checkpoints that load on any layout, and that show when a byte of them has changed.

A checkpoint is a folder `step_00001200/`:

    __0_0.distcp, .metadata   model and optimizer, by torch.distributed.checkpoint
    train_state.json          the run's position, and what else of it is plain numbers
    model.json                the model's shape, so that the model loads without the run's config
    generators.pt             states of torch's random generators
    manifest.json             size and sha256 of each of these

Training waits for a copy of the tensors in host memory; a thread writes it (unless
`checkpoint.asynchronous=false`). A folder with a checkpoint's name is complete
(`checkpoint_writer.py`). Loading takes the newest one whose files match the manifest, because
torch.distributed.checkpoint itself loads a flipped byte without an error. A manifest does not say
who wrote it, so nothing that a checkpoint holds is executed (`checkpoint_reader.py`).
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException

from gns_pretrain.errors import InputError, TrainingError, print_error
from gns_pretrain.fields import Settings, at_least
from gns_pretrain.parallel.collectives import errors_of_main, from_main, gathered
from gns_pretrain.parallel.mesh import World
from gns_pretrain.runs.directory import CHECKPOINTS
from gns_pretrain.system.processes import Worker, result_of
from gns_pretrain.system.remote import folder_at, is_remote, store_errors
from gns_pretrain.training.checkpoint_reader import (
    checkpoint_folders,
    damage,
    is_alone,
    load_checkpoint,
    pick_whole,
    reachable,
    root_cause,
    tensors_of,
)
from gns_pretrain.training.checkpoint_writer import (
    digests_of,
    folder_to_write,
    make_empty,
    publish,
    remove,
    remove_unfinished,
    seal,
    small_files,
    write_files,
    writer_to,
)


@dataclass
class CheckpointSettings(Settings):
    """How often a run saves itself, and how much it keeps."""

    section: ClassVar[str] = "checkpoint"

    # optimizer steps; a run also saves at its end and when asked to stop. A save that falls due
    # while a noise scale is still to be read (noise_scale.read_after_steps) comes with the reading.
    every_steps: Annotated[
        int, at_least(1, "step", hint="more than the run's steps saves only at its end")
    ] = 100
    # write beside training, which waits only for a copy in host memory
    asynchronous: bool = True
    keep: Annotated[int, at_least(1, hint="2 survive a bad disk")] = 2  # newest checkpoints
    # object storage by a URL of fsspec, with a folder for each run; null: the run directory
    directory: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directory is not None and "://" not in self.directory:
            raise InputError(
                f"checkpoint.directory={self.directory} is not a URL; use one such as "
                "s3://bucket/prefix, or null for the run directory"
            )

    def folder(self, run_directory: Path) -> Path:
        """Return the folder of a run's checkpoints."""
        if self.directory is None:
            return run_directory / CHECKPOINTS
        return folder_at(self.directory, "checkpoint.directory") / run_directory.name


class Checkpoints:
    """The checkpoints of one run directory; all ranks call `save` and `load_latest` together.

    Args:
        directory: holds them.
        keep: the newest that are not deleted.
        world: of training.
        beside: of a thread that writes beside training, see `beside_training`; None: `save` itself
            writes.
        on_save: called with the step of each one saved, on the main rank.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        world: World,
        beside: World | None = None,
        on_save: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.world = world
        self.writers = beside or world
        self.on_save = on_save
        self.newest: Path | None = None  # the last one that was saved, or began to be, or loaded
        self._thread = Worker() if beside else None
        # On a GPU the copies are pinned, and kept for the next save. torch 2.11's DefaultStager,
        # which would wait for them, stages only once.
        self._on_gpu = world.device.type == "cuda"
        self._stager = StateDictStager(pin_memory=self._on_gpu)
        self._under_way: Future[None] | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint of this step, then delete older ones beyond `keep`.

        Asynchronously it returns as soon as training may change the weights; of a save that is
        still under way it awaits the end, and raises its failure.

        Args:
            state: what else changes, fit for JSON; its `step` names the checkpoint.

        Returns:
            The folder that it has, or will have.

        Raises:
            TrainingError: one could not be written; earlier checkpoints are untouched.
        """
        self.wait()
        step, files = state["step"], small_files(model, state)
        with tensors_of(model, optimizer) as tensors:
            if self._thread is None:
                self._write(step, tensors, files)
            else:
                copies: Any = self._stager.stage(tensors, non_blocking=self._on_gpu)
                if self._on_gpu:
                    torch.cuda.synchronize(self.world.device)
                self._under_way = self._thread.start(lambda: self._write(step, copies, files))
        self.newest = self._folder_of(step)
        return self.newest

    @property
    def has_failed(self) -> bool:
        """Whether the save that was under way has failed, for `wait` to raise; asked by a rank."""
        save = self._under_way
        return save is not None and save.done() and save.exception() is not None

    def wait(self) -> None:
        """Wait for the save under way, if any; TrainingError, on all ranks, if it failed."""
        save, self._under_way = self._under_way, None
        if save is not None:
            result_of(save)

    def close(self) -> None:
        """Wait for the save under way, end the thread and free the copy in host memory.

        Called after an error of training, too: a save that fails as well is reported beside it.
        """
        try:
            self.wait()
        except TrainingError as error:
            print_error(error, rank=self.world.rank, num_ranks=self.world.num_ranks)
        finally:
            self._stager.close()
            if self._thread is not None:
                self._thread.end()

    def _folder_of(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _write(self, step: int, tensors: dict[str, Any], files: dict[str, bytes]) -> None:
        """Write a step's folder, then delete older ones; in a thread, beside training or not.

        Every collective is one of `writers`, since training has others at the same time.
        """
        target, is_main = self._folder_of(step), self.writers.is_main
        unfinished = folder_to_write(target)
        try:
            if self._on_each(lambda: is_main and damage(target) is None)[0]:
                return
            self._on_main(lambda: make_empty(unfinished))
            dcp.save(
                tensors,
                storage_writer=writer_to(unfinished),
                process_group=self.writers.group,
                no_dist=is_alone(self.writers),
            )
            self._on_main(lambda: write_files(unfinished, files))
            # Each rank reads back its own files: the hash covers what the disk holds.
            digests = self._on_each(lambda: digests_of(unfinished, self.writers.rank))
            self._on_main(lambda: seal(unfinished, digests))
            self._on_main(lambda: publish(unfinished, target))
            self._on_main(lambda: self.on_save(step))
        # torch's exception is a BaseException that holds each rank's error.
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_remote(target):
                older = "earlier ones are as they were"
            else:
                if is_main:
                    remove(unfinished)
                whole, _ = pick_whole(self.directory)
                older = f"{whole} is whole, the run resumes from it" if whole else "none is older"
            raise TrainingError(
                f"step {step}: the checkpoint {target} could not be written "
                f"({root_cause(error)}); {older}; make room or mend the path, and start the same "
                "command again",
                on_all_ranks=True,
            ) from error
        if is_main:
            self._prune(target)

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint into model, optimizer and random generators.

        What a kill has left is deleted: unfinished folders, and old ones half deleted.

        Returns:
            Its further state, None where there is no checkpoint; a line for each damaged one that
            was skipped.

        Raises:
            TrainingError: there are checkpoints and every one is damaged.
        """
        with errors_of_main(self.world), reachable(self.directory):
            found = pick_whole(self.directory) if self.world.is_main else None
            if found:
                remove_unfinished(self.directory)
                if found[0] is not None:
                    self._prune(found[0])
        chosen, damaged = from_main(found, self.world)
        if chosen is None:
            if damaged:
                raise TrainingError(
                    f"{'; '.join(damaged)}; no whole checkpoint is left in {self.directory}: "
                    "restore one, or restart with resume=never",
                    on_all_ranks=True,
                )
            return None, []
        self.newest = chosen
        return load_checkpoint(chosen, model, optimizer, self.world), damaged

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run something on the main rank; raise its failure on every rank."""
        self._on_each(lambda: action() if self.writers.is_main else None)

    def _on_each(self, action: Callable[[], Any]) -> list[Any]:
        """Run something on each rank; return all results, or raise the first failure, on each."""
        result, problem = None, None
        try:
            with store_errors(self.directory):
                result = action()
        except OSError as error:
            problem = str(error)
        found = gathered((result, problem), self.writers)
        for _, problem in found:
            if problem is not None:
                raise OSError(problem)
        return [result for result, _ in found]

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the newest `keep`, counted from the one written or loaded.

        A folder of a later step is one that the run could not load, and does not count. What
        cannot be deleted now (a file still open on NFS) is tried again after the next save.
        """
        folders = checkpoint_folders(self.directory)
        for old in folders[folders.index(newest) + self.keep :]:
            remove(old)
