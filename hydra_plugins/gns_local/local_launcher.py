"""Hydra's launcher for a sweep on this machine: `hydra.launcher.at_once` runs side by side."""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from rich.console import Console

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.ranks import place_from
from gns_pretrain.launch.sweep import Outcome, note_failures, plan_jobs, print_outcomes
from gns_pretrain.launch.sweep_processes import run_jobs
from gns_pretrain.launch.train import checked
from gns_pretrain.system.processes import EXIT_STOPPED

Composable = tuple[Sequence[str], Callable[[], Config]]


class LocalLauncher(Launcher):
    """Runs a sweep's jobs as processes of this machine.

    Args:
        at_once: runs side by side.
    """

    def __init__(self, at_once: int = 1) -> None:
        if at_once < 1:
            raise InputError(f"hydra.launcher.at_once={at_once} must be at least 1 run")
        self.at_once = at_once
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's call before `launch`."""
        self.config = config
        self.hydra_context = hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all runs, train those that need it, and say what became of each."""
        runs = self.runs_of(job_overrides)
        jobs = plan_jobs(runs, inspect=partial(checked, place=None))
        console = Console()
        outcomes = run_jobs(jobs, at_once=self.at_once, console=console)
        print_outcomes(outcomes, console)
        note_failures(outcomes)
        if any(outcome.state == "stopped" for outcome in outcomes):
            raise SystemExit(EXIT_STOPPED)
        of_run = {job.config.run_name: result for job, result in zip(jobs, outcomes, strict=True)}
        failed = sum(not outcome.is_there for outcome in outcomes)
        return [
            as_return(words, of_run[make_config().run_name], failed, len(outcomes))
            for words, make_config in runs
        ]

    def runs_of(self, job_overrides: Sequence[Sequence[str]]) -> list[Composable]:
        """Each run's overrides, and what composes its settings from them.

        Raises:
            InputError: every rank of a job would start the whole sweep.
        """
        if place_from(os.environ) is not None:
            raise InputError(
                "a sweep starts its runs itself: start it as one process, without torchrun or srun"
            )
        # Composing takes a quarter of a second: once a run.
        return [(words, cache(partial(self.settings_of, words))) for words in job_overrides]

    def settings_of(self, overrides: Sequence[str]) -> Config:
        """The settings of one run."""
        assert self.hydra_context is not None
        assert self.config is not None
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(composed)  # run_name reads the overrides from there
        job = composed.copy()
        with open_dict(job):
            del job["hydra"]
        return settings_from(job)


def as_return(
    overrides: Sequence[str], outcome: Outcome, failed: int, number_of_runs: int
) -> JobReturn:
    """A run's outcome for the sweeper; its value, for a search, is the lowest validation loss."""
    if outcome.is_there:
        loss = outcome.summary["minimum_validation_loss"]
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=loss)
    error = TrainingError(
        f"{failed} of {number_of_runs} runs failed; the table says why, and the same command "
        "goes on with them"
    )
    return JobReturn(overrides, status=JobStatus.FAILED, _return_value=error)
