"""Hydra's sweeper of branches: hydra/sweeper=branches, which +sweep=critical_batch chooses."""

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from gns_pretrain.launch.branches import BranchSettings, branches


class BranchSweeper(Sweeper):
    """Hands a launcher the branches of a run; which there are depends on its checkpoints."""

    def __init__(self, **settings: Any) -> None:
        plain: dict[str, Any] = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }
        self.settings = BranchSettings(**plain)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's call before `sweep`."""
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: Sequence[str]) -> Any:
        """Hydra's call: what was typed beside the sweep goes to every branch, and counts last."""
        jobs = [[*branch, *arguments] for branch in branches(self.settings)]
        assert self.launcher is not None
        return [self.launcher.launch(jobs, initial_job_idx=0)]
