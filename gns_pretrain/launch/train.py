"""Train a run: from one command to N ranks, and on each rank from joining the others to the end."""

import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from gns_pretrain.config.checks import (
    check_batch_size,
    check_layout,
    check_memory,
    check_noise_scale,
    check_parametrization,
)
from gns_pretrain.config.compose import as_yaml
from gns_pretrain.config.schema import Config
from gns_pretrain.data.staging import compile_cache, local_folder
from gns_pretrain.errors import (
    EXIT_BAD_INPUT,
    EXIT_CRASHED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_TRAINING,
    DivergedError,
    InputError,
    OneLineError,
    print_error,
)
from gns_pretrain.launch.build import build_run, decay_timescale
from gns_pretrain.launch.crash_report import CrashReporter, remove_empty_stacks, traces
from gns_pretrain.launch.header import TEXT_COLUMN, header
from gns_pretrain.launch.ranks import exit_with_launcher, rank_info_from, run_local_ranks
from gns_pretrain.parallel.collectives import barrier, errors_of_main, from_main, gathered
from gns_pretrain.parallel.mesh import RankInfo, World, joined, pick_device
from gns_pretrain.runs.directory import (
    PROVENANCE,
    STARTS,
    fresh_directory,
    is_finished,
    make_fresh,
)
from gns_pretrain.runs.history import (
    FIRST_CHECKPOINT,
    append_end,
    append_start,
    directory_of_requeued_job,
    read_provenance,
    write_provenance,
)
from gns_pretrain.runs.identity import identifying_settings, refuse_another_run
from gns_pretrain.runs.lock import locked
from gns_pretrain.system.files import check_folder, make_folder, must_write, remove_temporaries
from gns_pretrain.system.processes import StopRequest, end_process, threads_per_process
from gns_pretrain.system.slurm import SlurmJob, node_name
from gns_pretrain.system.streams import outlive_output
from gns_pretrain.system.terminal import wrapped, write
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import checkpoint_folders, reachable
from gns_pretrain.training.initialize import Source, check_source, find_source
from gns_pretrain.training.loop import rehearse, train
from gns_pretrain.workloads import open_workload


def launch(config: Config) -> int:
    """Validate the config, then train.

    Returns:
        The command's exit code: 0 finished, 3 the run cannot continue, 75 saved after a signal.

    Raises:
        InputError: before any process has started or any file was written.
    """
    info = rank_info_from(os.environ)
    show = write if info is None or info.rank == 0 else None
    directory, fingerprint = check_run(config, info, show=show)
    if not config.dry_run or is_finished(directory):
        return start(config, directory, fingerprint, info)
    code = EXIT_FINISHED
    if config.dry_run_steps:
        with TemporaryDirectory(prefix="gns-pretrain-dry-run-") as folder:
            directory = Path(folder) / directory.name
            code = start(in_folder(config, Path(folder)), directory, fingerprint, info)
    if show and code == EXIT_FINISHED:
        show("dry run: everything is checked, nothing was written")
    return code


def in_folder(config: Config, folder: Path) -> Config:
    """The settings of a dry run's steps, which write into a folder and nowhere else."""
    return dataclasses.replace(
        config,
        output_directory=str(folder),
        resume="auto",
        checkpoint=dataclasses.replace(config.checkpoint, directory=None, asynchronous=False),
        data=dataclasses.replace(config.data, stage_to=None),
        launch=dataclasses.replace(config.launch, compile_cache=None),
        metrics=MetricsSettings(log_every=1, progress="never"),
    )


def start(config: Config, directory: Path, fingerprint: str, info: RankInfo | None) -> int:
    """Train as the rank that this process is, or start the ranks; return the exit code."""
    if info is not None or config.launch.nproc_per_node == 1:
        return run_rank(config, directory, fingerprint, info or RankInfo())
    began = time.time()
    try:
        arguments = (config, directory, fingerprint)
        run_local_ranks(run_started_rank, arguments, config.launch.nproc_per_node)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for known in (EXIT_TRAINING, EXIT_BAD_INPUT, EXIT_STOPPED):
            if known in codes:
                return known
        rank, failure = error.get_first_failure()
        how = f"exit code {failure.exitcode}"  # after the traceback that it has printed
        if failure.exitcode < 0:
            how = f"{failure.signal_name()}, as when memory runs out"
        print(
            f"error: rank {rank} (process {failure.pid}) ended by {how}; the same command resumes "
            "the run",
            file=sys.stderr,
        )
        if left := traces(directory, since=began):
            write(left, file=sys.stderr)
        return EXIT_CRASHED
    return EXIT_FINISHED


def check_run(
    config: Config,
    info: RankInfo | None,
    *,
    trains_here: bool = True,
    show: Callable[..., None] | None = None,
) -> tuple[Path, str]:
    """Validate what one process can; return the run directory and the fingerprint of the data.

    Args:
        config: of the run.
        info: this rank, if a launcher has started it.
        trains_here: whether this machine's memory and disk are those of the run.
        show: prints lines: the header of a run that is not finished.

    Raises:
        InputError: the first rule that is broken; nothing of the run has been written.
    """
    ranks = config.launch.nproc_per_node if info is None else info.num_ranks
    ranks_per_node = info.ranks_per_node if info else ranks
    if ranks == 1 < config.launch.nproc_per_node:
        raise InputError(
            f"launch.nproc_per_node={config.launch.nproc_per_node}, but RANK and WORLD_SIZE=1 in "
            "the environment make this process the only rank; unset them, or leave the setting out"
        )
    check_layout(config, num_ranks=ranks, ranks_per_node=ranks_per_node)
    check_parametrization(config)
    directory = Path(config.output_directory) / config.run_name
    if config.resume == "never":
        directory = directory_of_requeued_job(directory) or fresh_directory(directory)
    checkpoints = config.checkpoint.folder(directory)
    with reachable(checkpoints):
        newest = next(iter(checkpoint_folders(checkpoints)), None)
    # A resumed run keeps its batch: where other ranks cannot take it, the next larger one.
    if newest is None:
        check_batch_size(config, num_ranks=ranks)
    check_noise_scale(config)
    for local_rank in range(ranks) if info is None else (info.local_rank,):
        device = pick_device(config.launch.device, local_rank)
    workload = open_workload(config)
    workload.check()
    timescale = decay_timescale(config, workload)
    if trains_here:
        memory = check_memory(
            config,
            workload,
            num_ranks=ranks,
            ranks_per_node=ranks_per_node,
            device=device.type,
        )
        check_folder(directory, "output_directory")
        if config.data.stage_to is not None:
            prepare = check_folder if config.dry_run else make_folder
            prepare(local_folder(config.data.stage_to), "data.stage_to")
    fingerprint = workload.fingerprint
    if config.resume == "auto":
        refuse_another_run(directory, identifying_settings(dataclasses.asdict(config), fingerprint))
    # Read by one of the ranks, or by what starts them: whoever started the others ends them.
    looks = newest is None and (info is None or info.rank == 0)
    begins = f"resumes from {newest.name}" if newest else "random weights"
    if looks and (source := find_source(config.initial)):
        begins = f"begins with {config.initial.what} of {source.folder}"
        check_source(config.initial, source, workload)
    if show and trains_here and not is_finished(directory):
        lines = header(
            config,
            num_ranks=ranks,
            ranks_per_node=ranks_per_node,
            device=device,
            workload=workload,
            memory=memory,
            timescale=timescale,
            directory=directory,
            begins=begins,
        )
        show(*(wrapped(line, indent=TEXT_COLUMN) for line in lines))
    return directory, fingerprint


def run_started_rank(
    config: Config, directory: Path, fingerprint: str, stop_flag: ctypes.c_bool, pipe: Connection
) -> None:
    """A rank that `launch` starts; it ends with its exit code, since the agent drops results."""
    exit_with_launcher(pipe)
    outlive_output(logs=True)
    info = rank_info_from(os.environ)
    assert info is not None, "the agent has set no RANK"
    code = run_rank(config, directory, fingerprint, info, StopRequest(stop_flag))
    if code:  # with 0 the agent waits for a result
        end_process(code)


def run_rank(
    config: Config,
    directory: Path,
    fingerprint: str,
    info: RankInfo,
    stop: StopRequest | None = None,
) -> int:
    """Train on one rank, from joining the others to the last line; return the exit code."""
    stop = stop or StopRequest()
    stop.listen()
    device = pick_device(config.launch.device, info.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(config.launch.threads or threads_per_process(info.ranks_per_node))
    job = SlurmJob.current()
    reporter = CrashReporter(info.rank, job.folder if job else None, alone=info.num_ranks == 1)
    try:
        with reporter.capture(), joined(info, config.parallel, device) as world:
            directory = own_directory(directory, config, world)
            if from_main(world.is_main and is_finished(directory), world):
                if world.is_main:
                    write(
                        f"{directory} is finished; resume=never restarts it in a fresh directory, "
                        f"and under another run_name init.from={directory} init.what=all goes on "
                        "from it to a larger token_budget"
                    )
                return EXIT_FINISHED
            code = train_in(directory, config, fingerprint, world, reporter=reporter, stop=stop)
            # srun ends the others as soon as one has exited with a code; rank 0 may be busy with
            # its last upload.
            barrier(world)
    except OneLineError as error:
        code = print_error(error, rank=info.rank, num_ranks=info.num_ranks)
    finally:
        reporter.close()
    return code


def own_directory(directory: Path, config: Config, world: World) -> Path:
    """The directory that rank 0 saw in `check_run`: ranks may have looked at different moments.

    With resume=never rank 0 makes a fresh one here, since another start may have seen the same.
    """
    with errors_of_main(world), must_write(directory, setting="output_directory"):
        if world.is_main and config.resume == "never":
            named = Path(config.output_directory) / config.run_name
            directory = directory_of_requeued_job(named) or make_fresh(named)
    return from_main(directory, world)


def train_in(
    directory: Path,
    config: Config,
    fingerprint: str,
    world: World,
    *,
    reporter: CrashReporter,
    stop: StopRequest,
) -> int:
    """Take the run directory, build the run, train it; return the exit code.

    An error is reported before anything is closed, since closing may wait for other ranks.
    """
    hint = "the same command resumes it"
    if config.resume == "never":
        hint = f"start it again with run_name={directory.name} resume=auto"
    # From here on it is a run like any other, by the name of its directory.
    config = dataclasses.replace(config, run_name=directory.name, resume="auto")
    shared, stage_to = config.launch.compile_cache, config.data.stage_to
    with ExitStack() as resources, reporter.capture():
        resources.enter_context(compile_cache(shared, stage_to, keep=world.is_main))
        source = resources.enter_context(taken(directory, config, fingerprint, world))
        reporter.set_run_directory(directory)
        run_id = read_provenance(directory)["run_id"] if world.is_main else ""
        run = build_run(config, world, directory, run_id=run_id, source=source)
        resources.enter_context(run.record)
        resources.callback(run.workload.close)
        resources.callback(run.checkpoints.close)
        run.record.start()
        if config.dry_run:
            rehearse(run, config.dry_run_steps)
            return EXIT_FINISHED
        with naming_the_way_back(run.checkpoints):
            finished = train(run, lambda: stop.requested)
        with errors_of_main(world), must_write(directory / STARTS):
            if world.is_main:
                append_end(directory, "finished" if finished else "stopped")
        if finished:
            run.record.finish({"parameters": sum(p.numel() for p in run.model.parameters())})
            return EXIT_FINISHED
        run.record.message(f"asked to stop: saved at step {run.adaptive.steps:,}; {hint}")
        return EXIT_STOPPED


@contextmanager
def naming_the_way_back(checkpoints: Checkpoints) -> Iterator[None]:
    """Add to the error of a run that diverged how another goes on from its checkpoint."""
    try:
        yield
    except DivergedError as error:
        way_back = "start anew under another run_name with a lower optimizer.lr"
        if checkpoints.newest is not None:
            way_back = (
                f"go on under another run_name with init.from={checkpoints.newest} init.what=all "
                "and a lower optimizer.lr"
            )
        raise DivergedError(f"{error}, or {way_back}", on_all_ranks=True) from error


@contextmanager
def taken(
    directory: Path, config: Config, fingerprint: str, world: World
) -> Iterator[Source | None]:
    """Lock the run directory on rank 0 and write what the run is; all ranks raise a refusal.

    Yields:
        What the run begins from; None where it is nothing, or the run has a checkpoint of its own.
    """
    nodes = gathered(node_name(), world)
    settings = identifying_settings(dataclasses.asdict(config), fingerprint)
    source = None
    with ExitStack() as lock:
        with errors_of_main(world), must_write(directory):
            if world.is_main:
                make_folder(directory, "output_directory")
                lock.enter_context(locked(directory))
                # Again, since another command may have used the directory after the first look.
                refuse_another_run(directory, settings)
                checkpoints = config.checkpoint.folder(directory)
                refuse_lost_checkpoints(directory, checkpoints)
                remove_temporaries(directory)
                remove_empty_stacks(directory)
                if not checkpoint_folders(checkpoints):
                    source = find_source(config.initial)
                init = source.as_record(config.initial) if source else None
                origin = dataclasses.asdict(config.data.origin())
                write_provenance(directory, as_yaml(config), fingerprint, origin, init)
                append_start(directory, nodes=nodes, gpu=gpu_versions())
        yield from_main(source, world)


def refuse_lost_checkpoints(directory: Path, checkpoints: Path) -> None:
    """Refuse to restart from nothing, over its record, a run that has saved itself before."""
    saved = (directory / PROVENANCE).is_file() and FIRST_CHECKPOINT in read_provenance(directory)
    if saved and not checkpoint_folders(checkpoints):
        raise InputError(
            f"{checkpoints} holds no checkpoint, but the run has saved some; restore "
            "one, or restart with resume=never"
        )


def gpu_versions() -> dict[str, Any]:
    """The GPU and the versions of its libraries; None where there is none."""
    on_gpu = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
    }
