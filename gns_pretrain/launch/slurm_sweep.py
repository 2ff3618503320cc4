"""The runs of a sweep as SLURM jobs: one element of a job array each."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gns_pretrain.fields import Settings, at_least
from gns_pretrain.launch.sweep import PlannedRun, RunResult, skip_or_reuse
from gns_pretrain.runs.directory import is_finished, read_summary
from gns_pretrain.system.processes import PACKAGE_ROOT
from gns_pretrain.system.slurm import (
    JOB_FOLDER,
    LOG_FOLDER,
    append_submitted,
    job_states,
    queued_runs,
    wait_for_jobs,
)


@dataclass
class SlurmSettings(Settings):
    """Of hydra/launcher=slurm; conf/hydra/launcher/slurm.yaml explains them."""

    section: ClassVar[str] = "hydra.launcher"

    max_parallel: Annotated[int, at_least(1, "run")]
    wait: bool
    nodes: Annotated[int, at_least(1)]
    gpus_per_node: int
    tasks_per_node: Annotated[int, at_least(1)]
    restarts_after_failure: int
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options, by submitit's names

    def executor_parameters(self, folder: Path) -> dict[str, Any]:
        """Options of sbatch and srun, by submitit's names; `folder` is for crash reports."""
        python, at_most = shlex.quote(sys.executable), self.restarts_after_failure
        root = shlex.quote(str(PACKAGE_ROOT))
        parameters: dict[str, Any] = {
            "job_name": "gns-pretrain",
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus_per_node or None,
            "array_parallelism": self.max_parallel,
            "stderr_to_stdout": True,
            # One log a job: submitit would have one a rank.
            "srun_args": ["--kill-on-bad-exit=1", "--output=all"],
            "setup": [
                f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"',
                f'export {JOB_FOLDER}={shlex.quote(str(folder))}/job-"$SLURM_JOB_ID"',
                'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
                'export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"',
                'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
                'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"',
                "export SUBMITIT_LOG_LEVEL=WARNING",
                "trap : TERM USR1 USR2  # the signal before the end is for the ranks",
            ],
            "teardown": [
                "code=$?",
                f'{python} -m gns_pretrain.launch.requeue "$code" --at-most {at_most}',
                'exit "$code"',
            ],
            **self.sbatch,
        }
        further = parameters.get("additional_parameters") or {}
        parameters["additional_parameters"] = {"requeue": True, **further}
        # wckey is submitit's own accounting label, which some clusters refuse.
        return {name: v for name, v in parameters.items() if v is not None} | {"wckey": None}


def submit_runs(
    runs: Sequence[PlannedRun],
    submit_array: Callable[[Sequence[PlannedRun], Path], list[str]],
    *,
    wait: bool,
    log: Callable[[str], None],
) -> list[RunResult]:
    """Submit the runs that are neither finished nor in the queue; return each run's result.

    Args:
        runs: of one sweep.
        submit_array: submits runs as one job array; gets the folder for its logs, returns the ids.
        wait: return when all jobs have ended.
        log: prints a line.
    """
    folder = runs[0].directory.parent.joinpath(*LOG_FOLDER).resolve()
    in_queue = queued_runs(folder, job_states())
    results: dict[Path, RunResult] = {}
    ready = []
    for run in runs:
        if result := skip_or_reuse(run, log=log):
            results[run.directory] = result
        elif job := in_queue.get(run.directory.resolve()):
            results[run.directory] = RunResult(run.name, "submitted", f"in the queue as job {job}")
        else:
            ready.append(run)
    jobs = submit_array(ready, folder) if ready else []
    if ready:
        append_submitted(folder, [run.directory.resolve() for run in ready], jobs)
    if wait:
        wait_for_jobs(jobs, log=log)
    for run, job in zip(ready, jobs, strict=True):
        if not wait:
            result = RunResult(run.name, "submitted", f"as job {job}")
        elif is_finished(run.directory):
            result = RunResult(run.name, "finished", summary=read_summary(run.directory))
        else:
            result = RunResult(run.name, "failed", f"its log in {folder} says why")
        results[run.directory] = result
    return [results[run.directory] for run in runs]
