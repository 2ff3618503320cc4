"""From one command to N ranks that train."""

import ctypes
import dataclasses
import os
import sys
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from gns_pretrain.config.checks import check_batch_size, check_data, check_layout
from gns_pretrain.config.compose import as_dict, as_yaml, read_yaml
from gns_pretrain.config.schema import Config
from gns_pretrain.data.settings import open_splits
from gns_pretrain.data.staging import compile_cache
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.build import build_run, data_fingerprint
from gns_pretrain.launch.crash_report import LastWords, current_words
from gns_pretrain.launch.ranks import leave_with_launcher, place_from, run_local_ranks
from gns_pretrain.parallel.collectives import barrier, from_main, gathered
from gns_pretrain.parallel.mesh import RankInfo, World, joined, pick_device
from gns_pretrain.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    fresh,
    is_finished,
    read_provenance,
    write_provenance,
)
from gns_pretrain.runs.history import begun_here, note_end, note_start
from gns_pretrain.runs.identity import refuse_another_run
from gns_pretrain.runs.lock import locked
from gns_pretrain.system.files import make_folder, remove_temporaries
from gns_pretrain.system.processes import EXIT_STOPPED, StopRequest, threads_of_each
from gns_pretrain.system.slurm import node_name
from gns_pretrain.training.checkpoint import checkpoint_folders
from gns_pretrain.training.loop import train

EXIT_FINISHED = 0
EXIT_BAD_INPUT = 2  # a setting or a file that people can mend
EXIT_TRAINING = 3  # the run cannot go on: a loss that is not finite, a full disk


def launch(config: Config) -> int:
    """Check everything that can be checked without other ranks, then train.

    Returns:
        The command's exit code: 0 finished, 3 the run cannot go on, 75 saved after a signal.

    Raises:
        InputError: before any process has started or any file was written.
    """
    place = place_from(os.environ)
    directory, fingerprint = checked(config, place)
    if place is None and config.launch.nproc_per_node > 1:
        return start_ranks(config, directory, fingerprint, config.launch.nproc_per_node)
    return run_rank(config, directory, fingerprint, place or RankInfo())


def checked(config: Config, place: RankInfo | None) -> tuple[Path, str]:
    """The run's folder and its data's fingerprint, once every rule is found kept.

    Raises:
        InputError: the first rule that is broken; nothing has been written.
    """
    ranks = config.launch.nproc_per_node if place is None else place.num_ranks
    check_layout(config, num_ranks=ranks, ranks_per_node=place.ranks_per_node if place else ranks)
    directory = run_folder(config)
    # A run that goes on keeps its batch: where other ranks cannot take it, the next larger one.
    if not checkpoint_folders(directory / CHECKPOINTS):
        check_batch_size(config, num_ranks=ranks)
    for local_rank in range(ranks) if place is None else (place.local_rank,):
        pick_device(config.launch.device, local_rank)
    splits = open_splits(config.data)
    check_data(
        config,
        data_vocab_size=splits[0].vocab_size,
        validation_sequences=splits[1].num_sequences(config.data.sequence_length),
    )
    fingerprint = data_fingerprint(splits)
    if config.resume == "auto":
        check_directory(directory, config, fingerprint)
    return directory, fingerprint


def run_folder(config: Config) -> Path:
    """`outputs/<run_name>`, or a fresh one beside it when nothing may be resumed."""
    directory = Path(config.output_directory) / config.run_name
    if config.resume == "never":
        return begun_here(directory) or fresh(directory)
    return directory


def check_directory(directory: Path, config: Config, fingerprint: str) -> None:
    """Refuse to go on with a run that was started with other settings or data."""
    if (directory / CONFIG).exists():
        refuse_another_run(
            directory,
            before=read_yaml(directory / CONFIG),
            now=as_dict(config),
            data_fingerprint=fingerprint,
        )


def start_ranks(config: Config, directory: Path, fingerprint: str, ranks: int) -> int:
    """Start `ranks` processes on this machine and wait for them."""
    try:
        run_local_ranks(run_started_rank, (config, directory, fingerprint), ranks)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for known in (EXIT_TRAINING, EXIT_BAD_INPUT, EXIT_STOPPED):
            if known in codes:
                return known
        raise
    return EXIT_FINISHED


def run_started_rank(
    config: Config, directory: Path, fingerprint: str, asked: ctypes.c_bool, told: Connection
) -> None:
    """A rank of `start_ranks`; its code is the process's own, since the agent drops a result."""
    leave_with_launcher(told)
    place = place_from(os.environ)
    assert place is not None, "the agent has set no RANK"
    code = run_rank(config, directory, fingerprint, place, StopRequest(asked))
    if code:
        sys.stderr.flush()
        os._exit(code)


def run_rank(
    config: Config,
    directory: Path,
    fingerprint: str,
    place: RankInfo,
    stop: StopRequest | None = None,
) -> int:
    """Train on one rank, from joining the others to the last line; gives the exit code."""
    stop = stop or StopRequest()
    stop.listen()
    device = pick_device(config.launch.device, place.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(config.launch.threads or threads_of_each(place.ranks_per_node))
    words = current_words(place.rank, place.num_ranks)
    try:
        with words.kept(), joined(place, config.parallel, device) as world:
            caches = compile_cache(
                config.launch.compile_cache, config.data.stage_to, keep=world.is_main
            )
            with caches, ExitStack() as held, words.kept():
                code = run_in(world, config, directory, fingerprint, stop, held, words)
            # srun ends the others as soon as one has left with a code; the main one may be busy
            # with its last upload.
            barrier(world)
    except (InputError, TrainingError) as error:
        code = say(error, place)
    finally:
        words.close()
    return code


def run_in(
    world: World,
    config: Config,
    directory: Path,
    fingerprint: str,
    stop: StopRequest,
    held: ExitStack,
    words: LastWords,
) -> int:
    """Take the run's folder, build the run and train it."""
    # Ranks may have looked at different moments: the main one's folder is everybody's.
    directory = from_main(directory, world)
    if from_main(world.is_main and is_finished(directory), world):
        if world.is_main:
            print(f"{directory} is finished; resume=never starts over in a fresh folder")
        return EXIT_FINISHED
    began_afresh = config.resume == "never"
    # From here on it is a run like any other, by the name of its folder.
    config = dataclasses.replace(config, run_name=directory.name, resume="auto")
    take_directory(world, config, directory, fingerprint, held)
    words.know(directory)
    with words.noted(directory):
        run_id = read_provenance(directory)["run_id"] if world.is_main else ""
        run = build_run(config, world, directory, run_id=run_id)
        held.callback(run.record.close)
        held.callback(run.batches.close)
        finished = train(run, lambda: stop.requested)
    if world.is_main:
        note_end(directory, "finished" if finished else "stopped")
    if finished:
        run.record.finish({"parameters": sum(p.numel() for p in run.model.parameters())})
        return EXIT_FINISHED
    way_on = (
        f"start it again with run_name={directory.name} resume=auto"
        if began_afresh
        else "the same command goes on from there"
    )
    run.record.message(f"asked to stop: saved at step {run.state.step:,}; {way_on}")
    return EXIT_STOPPED


def take_directory(
    world: World, config: Config, directory: Path, fingerprint: str, held: ExitStack
) -> None:
    """Lock the folder on the main rank and write what the run is; a refusal reaches all ranks."""
    problem: InputError | TrainingError | None = None
    nodes = gathered(node_name(), world)
    if world.is_main:
        try:
            make_folder(directory, "output_directory")
            held.enter_context(locked(directory))
            remove_temporaries(directory)
            write_provenance(directory, as_yaml(config), fingerprint)
            note_start(directory, nodes=nodes)
        except InputError as error:
            problem = error
        except OSError as error:
            problem = TrainingError(
                f"{error.filename or directory} could not be written ({error.strerror or error}); "
                "make room or mend the path, and start the same command again"
            )
    problem = from_main(problem, world)
    if problem is not None:
        problem.on_all_ranks = True
        raise problem


def say(error: InputError | TrainingError, place: RankInfo | None = None) -> int:
    """Print an error that people can act on, and give the exit code for it.

    Args:
        place: of the rank that met it, which is named; the main one tells what all have met.
    """
    own = place is not None and place.num_ranks > 1 and not error.on_all_ranks
    if place is None or own or place.rank == 0:
        rank = f"rank {place.rank}: " if place is not None and own else ""
        print(f"error: {rank}{error}", file=sys.stderr)
    return EXIT_TRAINING if isinstance(error, TrainingError) else EXIT_BAD_INPUT
