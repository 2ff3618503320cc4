"""From one command to N ranks that train."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gns_pretrain.build import build_run, data_fingerprint
from gns_pretrain.composition import as_dict, as_yaml, read_yaml
from gns_pretrain.config import Config, check_batch_size, check_data, check_layout
from gns_pretrain.data.settings import open_splits
from gns_pretrain.data.staging import compile_cache
from gns_pretrain.distributed.checkpoint import checkpoint_folders
from gns_pretrain.distributed.collectives import barrier, from_main, gathered
from gns_pretrain.distributed.mesh import Place, World, joined, pick_device
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.loop import train
from gns_pretrain.place import place_from
from gns_pretrain.rank_words import LastWords, current_words
from gns_pretrain.run_directory import (
    CHECKPOINTS,
    CONFIG,
    fresh,
    is_finished,
    refuse_another_run,
    write_provenance,
)
from gns_pretrain.run_lock import locked
from gns_pretrain.slurm import node_name
from gns_pretrain.starts import begun_here, note_end, note_start
from gns_pretrain.stop import EXIT_STOPPED, STOP_SIGNALS, StopRequest

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
    return run_rank(config, directory, fingerprint, place or Place())


def checked(config: Config, place: Place | None) -> tuple[Path, str]:
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
    """Start `ranks` processes on this machine through torch's elastic agent and wait for them."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        # One server imports torch and is forked for each rank: N imports would fight for the cores.
        start_method="forkserver",
        # The ranks get the signals below from us and finish their step; the agent would kill them.
        signals_to_handle="SIGHUP",
    )
    multiprocessing.set_forkserver_preload([__name__])
    with signals_passed_on():
        try:
            elastic_launch(settings, entrypoint=run_rank)(config, directory, fingerprint)
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            for known in (EXIT_TRAINING, EXIT_BAD_INPUT, EXIT_STOPPED):
                if known in codes:
                    return known
            raise
    return EXIT_FINISHED


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """Hand a request to stop to the ranks, as SIGTERM, which they may safely get twice."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_rank(config: Config, directory: Path, fingerprint: str, place: Place | None = None) -> int:
    """Train on one rank, from joining the others to the last line.

    Under the elastic agent `place` is not given and comes from the environment; the code is then
    the process's own exit code, because the agent drops what a function returns.
    """
    started_by_agent = place is None
    place = place or place_from(os.environ) or Place()
    stop = StopRequest()
    stop.listen()
    device = pick_device(config.launch.device, place.local_rank)
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        torch.set_num_threads(config.launch.threads or max(cores // place.ranks_per_node, 1))
    words = current_words(place.rank)
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
        code = say(error, quiet=place.rank > 0)
    finally:
        words.close()
    if started_by_agent and code:
        sys.stderr.flush()
        os._exit(code)
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
    take_directory(world, config, directory, fingerprint, held)
    words.know(directory)
    run = build_run(config, world, directory)
    held.callback(run.record.close)
    held.callback(run.batches.close)
    finished = train(run, stop)
    if world.is_main:
        note_end(directory, "finished" if finished else "stopped")
    if finished:
        run.record.finish({"parameters": sum(p.numel() for p in run.model.parameters())})
        return EXIT_FINISHED
    run.record.message(
        f"asked to stop: saved at step {run.state.step:,}; the same command goes on from there"
    )
    return EXIT_STOPPED


def take_directory(
    world: World, config: Config, directory: Path, fingerprint: str, held: ExitStack
) -> None:
    """Lock the folder on the main rank and write what the run is; a refusal reaches all ranks."""
    problem: InputError | None = None
    nodes = gathered(node_name(), world)
    if world.is_main:
        try:
            held.enter_context(locked(directory))
            write_provenance(directory, as_yaml(config), fingerprint)
            note_start(directory, nodes=nodes)
        except InputError as error:
            problem = error
    problem = from_main(problem, world)
    if problem is not None:
        raise problem


def say(error: Exception, *, quiet: bool = False) -> int:
    """Print an error that people can act on, and give the exit code for it."""
    if not quiet:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_TRAINING if isinstance(error, TrainingError) else EXIT_BAD_INPUT
