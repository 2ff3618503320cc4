"""What needs submitit: a run as it is pickled for its job, and the array that is submitted.

The underscore keeps Hydra's search for plugins from importing this where submitit is not installed.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn

from gns_pretrain.config.schema import register_schemas
from gns_pretrain.errors import InputError
from gns_pretrain.launch.sweep import Job
from gns_pretrain.system.slurm import JOB_FOLDER

try:
    import submitit
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError as error:
    raise InputError(
        "hydra/launcher=slurm needs submitit; pip install 'gns-pretrain[slurm]'"
    ) from error

if TYPE_CHECKING:
    from hydra_plugins.gns_slurm.slurm_launcher import SlurmSweepLauncher


ROOT = Path(__file__).resolve().parents[2]  # where the plugins are found


class RunInJob(SlurmLauncher):
    """One run, called on every rank of its job."""

    def __call__(self, *arguments: Any, **keywords: Any) -> JobReturn:
        """Compose the settings once more, as in the command that submitted, and train."""
        register_schemas()  # OmegaConf's resolvers do not travel in the pickle
        return super().__call__(*arguments, **keywords)


def submit_array(launcher: "SlurmSweepLauncher", jobs: Sequence[Job], folder: Path) -> list[str]:
    """Submit runs as one job array (a plain job for one run).

    Args:
        launcher: its settings, and what Hydra has told it.
        jobs: the runs.
        folder: for logs, pickles and the ranks' last words.

    Returns:
        The jobs' ids, in order: `12_0`, `12_1`, ...
    """
    assert launcher.hydra_context is not None
    assert launcher.task_function is not None
    assert launcher.config is not None
    folder.mkdir(parents=True, exist_ok=True)
    run = RunInJob()
    run.setup(
        hydra_context=launcher.hydra_context,
        task_function=launcher.task_function,
        config=launcher.config,
    )
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
    except RuntimeError as error:
        raise InputError(
            f"hydra/launcher=slurm: {error} Start the sweep on a login node"
        ) from error
    executor.update_parameters(**sbatch_settings(launcher, folder))
    state = Singleton.get_state()
    with executor.batch():
        submitted = [
            executor.submit(run, list(job.overrides), "hydra.sweep.dir", number, job.name, state)
            for number, job in enumerate(jobs)
        ]
    return [job.job_id for job in submitted]


def sbatch_settings(launcher: "SlurmSweepLauncher", folder: Path) -> dict[str, Any]:
    """Options of sbatch and srun, by submitit's names."""
    python = shlex.quote(sys.executable)
    at_most = launcher.restarts_after_failure
    settings: dict[str, Any] = {
        "job_name": "gns-pretrain",
        "nodes": launcher.nodes,
        "ntasks_per_node": launcher.tasks_per_node,
        "gpus_per_node": launcher.gpus_per_node or None,
        "array_parallelism": launcher.at_once,
        "stderr_to_stdout": True,
        # One log a job: submitit would have one a rank.
        "srun_args": ["--kill-on-bad-exit=1", "--output=all"],
        "setup": [
            f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            f'export {JOB_FOLDER}={shlex.quote(str(folder))}/job-"$SLURM_JOB_ID"',
            'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
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
        **launcher.sbatch,
    }
    settings["additional_parameters"] = {
        "requeue": True,
        **(settings.get("additional_parameters") or {}),
    }
    # submitit's own accounting label: clusters that keep such labels refuse one they do not know.
    return {name: value for name, value in settings.items() if value is not None} | {"wckey": None}
