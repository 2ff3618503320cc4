"""Hydra's launcher for a sweep on SLURM: one element of a job array a run, through submitit.

The command that submits returns at once; `scripts/status.py` tells how the runs are, and the same
command submits again whatever is neither finished nor in the queue.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.status import Submission, note_submissions, queued, wait_until_ended
from gns_pretrain.launch.sweep import Job, Outcome, note_failures, plan_jobs, print_outcomes, settle
from gns_pretrain.launch.train import checked
from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.system.slurm import job_states
from hydra_plugins.gns_local.local_launcher import LocalLauncher


class SlurmSweepLauncher(LocalLauncher):
    """Submits a sweep's runs to SLURM; conf/hydra/launcher/slurm.yaml explains the settings."""

    def __init__(
        self,
        *,
        at_once: int,
        wait: bool,
        nodes: int,
        gpus_per_node: int,
        tasks_per_node: int,
        restarts_after_failure: int,
        **sbatch: Any,
    ) -> None:
        super().__init__(at_once)
        for name, value in (("nodes", nodes), ("tasks_per_node", tasks_per_node)):
            if value < 1:
                raise InputError(f"hydra.launcher.{name}={value} must be at least 1")
        self.wait = wait
        self.nodes = nodes
        self.gpus_per_node = gpus_per_node
        self.tasks_per_node = tasks_per_node
        self.restarts_after_failure = restarts_after_failure
        self.sbatch = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in sbatch.items()
        }
        self.task_function: TaskFunction | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's call before `launch`."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task_function = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all runs, submit those that need it, and say what became of each."""
        runs = self.runs_of(job_overrides)
        ranks = self.nodes * self.tasks_per_node
        first_rank = RankInfo(num_ranks=ranks, ranks_per_node=self.tasks_per_node)
        jobs = plan_jobs(runs, inspect=partial(checked, place=first_rank if ranks > 1 else None))
        console = Console()
        outcomes = self.submit(jobs, console)
        print_outcomes(list(outcomes.values()), console)
        note_failures(list(outcomes.values()))
        failed = sum(outcome.state == "failed" for outcome in outcomes.values())
        return [
            as_return(words, outcomes[make_config().run_name], failed)
            for words, make_config in runs
        ]

    def submit(self, jobs: Sequence[Job], console: Console) -> dict[str, Outcome]:
        """Submit what is neither finished nor in the queue; returns the outcome by run_name."""
        from hydra_plugins.gns_slurm._submission import submit_array

        say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
        log_folder = self.log_folder(jobs)
        known = queued(log_folder, job_states())
        outcomes: dict[str, Outcome] = {}
        ready = []
        for job in jobs:
            if settled := settle(job, say=say):
                outcomes[job.name] = settled
            elif job.directory.resolve() in known:
                why = f"in the queue as job {known[job.directory.resolve()]}"
                outcomes[job.name] = Outcome(job.name, "submitted", why)
            else:
                ready.append(job)
        ids = submit_array(self, ready, log_folder) if ready else []
        submissions = [
            Submission(job.directory.resolve(), number)
            for job, number in zip(ready, ids, strict=True)
        ]
        note_submissions(log_folder, submissions)
        outcomes |= {
            job.name: Outcome(job.name, "submitted", f"as job {number}")
            for job, number in zip(ready, ids, strict=True)
        }
        if self.wait:
            wait_until_ended(ids, say=say)
            outcomes |= {job.name: ended(job, log_folder, say) for job in ready}
        return {job.config.run_name: outcomes[job.name] for job in jobs}

    def log_folder(self, jobs: Sequence[Job]) -> Path:
        """Where the jobs' logs and submitit's files go; shared by all nodes like the runs."""
        return (jobs[0].directory.parent / "logs" / "slurm").resolve()


def ended(job: Job, log_folder: Path, say: Any) -> Outcome:
    """What became of a run whose job has left the queue."""
    if settled := settle(job, say=say):
        return Outcome(job.name, "finished", summary=settled.summary)
    return Outcome(job.name, "failed", f"its log in {log_folder} says why")


def as_return(overrides: Sequence[str], outcome: Outcome, failed: int) -> JobReturn:
    """A run's outcome for the sweeper; its value, for a search, is the lowest validation loss."""
    if outcome.state == "failed":
        error = TrainingError(
            f"{failed} runs failed; the table says where to look, and the same command goes on "
            "with them"
        )
        return JobReturn(overrides, status=JobStatus.FAILED, _return_value=error)
    loss = outcome.summary.get("minimum_validation_loss")
    return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=loss)
