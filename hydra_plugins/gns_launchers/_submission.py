"""What needs submitit: a run as it is pickled for its job, and the array that is submitted.

The underscore keeps Hydra's search for plugins from importing this where submitit is not installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn

from gns_pretrain.config.register import register_configs
from gns_pretrain.errors import InputError, needs
from gns_pretrain.launch.slurm_sweep import SlurmSettings
from gns_pretrain.launch.sweep import PlannedRun
from gns_pretrain.system.processes import rank_process

with needs("slurm", "hydra/launcher=slurm needs submitit"):
    import submitit
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher


class RunInJob(SlurmLauncher):
    """One run, called on every rank of its job."""

    def __call__(self, *arguments: Any, **keywords: Any) -> JobReturn:
        """Compose the settings once more, as in the command that submitted, and train."""
        register_configs()
        with rank_process():  # submitit would end the rank after writing a result that nobody reads
            return super().__call__(*arguments, **keywords)


def submit_array(
    run_in_job: RunInJob, settings: SlurmSettings, runs: Sequence[PlannedRun], folder: Path
) -> list[str]:
    """Submit runs as one job array (a plain job for one run).

    Returns:
        The jobs' ids, in order: `12_0`, `12_1`, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
    except RuntimeError as error:
        raise InputError(
            f"hydra/launcher=slurm: {error} Start the sweep on a login node"
        ) from error
    executor.update_parameters(**settings.executor_parameters(folder))
    state = Singleton.get_state()
    with executor.batch():
        jobs = [
            executor.submit(
                run_in_job, list(run.overrides), "hydra.sweep.dir", number, run.name, state
            )
            for number, run in enumerate(runs)
        ]
    return [job.job_id for job in jobs]
