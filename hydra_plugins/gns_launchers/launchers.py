"""Hydra's launchers for a sweep: hydra/launcher=local, the default, and hydra/launcher=slurm."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import EXIT_STOPPED, InputError, TrainingError, counted
from gns_pretrain.launch.ranks import rank_info_from
from gns_pretrain.launch.slurm_sweep import SlurmSettings, submit_runs
from gns_pretrain.launch.sweep import (
    PlannedRun,
    RunResult,
    plan_runs,
    print_line,
    report_results,
    stand_ins,
    train_runs,
)
from gns_pretrain.launch.train import check_run
from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.system.terminal import Console, write


class SweepLauncher(Launcher):
    """Checks all runs of a sweep, does what each needs and reports the results."""

    first_rank: RankInfo | None = None  # as which a run is checked; None where it starts its ranks
    trains_here = True  # on the machine that checks them

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's call before `launch`; before both it checks every run, which takes its time."""
        print_line(Console(), "checking the settings of every run ...")
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Hydra's call: train the runs that these overrides make.

        Raises:
            InputError: some run cannot be started; none was.
        """
        if rank_info_from(os.environ) is not None:
            raise InputError(
                "a sweep starts its runs itself: start it as one process, without torchrun or srun"
            )
        dry_run = self.config.dry_run
        if self.config.dry_run_steps:
            raise InputError("dry_run_steps are a single run's; a sweep's dry run trains none")
        check = partial(
            check_run,
            info=self.first_rank,
            trains_here=self.trains_here,
            show=partial(write, "") if dry_run else None,
        )
        planned = plan_runs(
            job_overrides, self.compose, check, search_path=search_path_of(self.config)
        )
        if dry_run:
            write("", f"dry run: {counted(len(planned), 'run')} checked, nothing was written")
            done = partial(JobReturn, status=JobStatus.COMPLETED, _return_value=0.0)
            return [done(words) for words in job_overrides]
        runs = {run.directory: run for run in planned}
        console = Console()
        for line in stand_ins(planned):
            print_line(console, line)
        results = dict(zip(runs, self.run(list(runs.values()), console), strict=True))
        report_results(list(results.values()), console)
        if any(result.state == "stopped" for result in results.values()):
            raise SystemExit(EXIT_STOPPED)
        return [
            job_return(words, results[run.directory])
            for words, run in zip(job_overrides, planned, strict=True)
        ]

    @abstractmethod
    def run(self, runs: Sequence[PlannedRun], console: Console) -> list[RunResult]:
        """Train runs, or submit them; return the result of each, in order."""

    def compose(self, overrides: Sequence[str]) -> Config:
        """The settings of one run."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        every_override = composed.hydra.overrides.task
        with open_dict(composed):
            del composed["hydra"]
        return settings_from(composed, every_override)


def search_path_of(config: DictConfig) -> tuple[str, ...]:
    """What the sweep's command says of where YAML files lie, as words of a run's own command."""
    hydra = config.hydra
    sources = hydra.runtime.config_sources
    return (
        *(f"--config-dir={each.path}" for each in sources if each.provider == "command-line"),
        f"--config-name={hydra.job.config_name}",
        *(word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath=")),
    )


def job_return(overrides: Sequence[str], result: RunResult) -> JobReturn:
    """A run's result for the sweeper; its value, for a search, is the lowest validation loss."""
    if result.state == "failed":
        error = TrainingError(f"{result.name} failed: {result.why}")
        return JobReturn(overrides, status=JobStatus.FAILED, _return_value=error)
    loss = result.summary.get("minimum_validation_loss")
    return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=loss)


class LocalLauncher(SweepLauncher):
    """Trains a sweep's runs as processes of this machine, `max_parallel` in parallel."""

    def __init__(self, max_parallel: int = 1) -> None:
        if max_parallel < 1:
            raise InputError(f"hydra.launcher.max_parallel={max_parallel} must be at least 1 run")
        self.max_parallel = max_parallel

    def run(self, runs: Sequence[PlannedRun], console: Console) -> list[RunResult]:
        return train_runs(runs, max_parallel=self.max_parallel, console=console)


class SlurmSweepLauncher(SweepLauncher):
    """Submits a sweep's runs to SLURM as a job array and returns.

    `gns-pretrain status` shows how the runs are, and the same command submits again whatever is
    neither finished nor in the queue. conf/hydra/launcher/slurm.yaml explains the settings.
    """

    trains_here = False

    def __init__(self, **settings: Any) -> None:
        plain = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }
        own: dict[str, Any] = {
            f.name: plain.pop(f.name) for f in fields(SlurmSettings) if f.name in plain
        }
        self.settings = SlurmSettings(**own, sbatch=plain)
        ranks = self.settings.nodes * self.settings.tasks_per_node
        if ranks > 1:
            per_node = self.settings.tasks_per_node
            self.first_rank = RankInfo(num_ranks=ranks, ranks_per_node=per_node)

    def run(self, runs: Sequence[PlannedRun], console: Console) -> list[RunResult]:
        """Submit runs."""
        from hydra_plugins.gns_launchers._submission import RunInJob, submit_array

        run_in_job = RunInJob()
        run_in_job.setup(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
        submit = partial(submit_array, run_in_job, self.settings)
        log = partial(print_line, console)
        return submit_runs(runs, submit, wait=self.settings.wait, log=log)
