"""A whole run in this process: what `python train.py` does, without its signal handlers."""

from collections.abc import Callable, Mapping

import torch

from gns_pretrain.config.schema import Config
from gns_pretrain.launch.crash_report import CrashReporter
from gns_pretrain.launch.train import check_run, train_in
from gns_pretrain.parallel.mesh import World
from gns_pretrain.system.processes import StopRequest

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


class StopAfter(StopRequest):
    """A request to stop that comes during a step, counted from this start.

    Args:
        steps: number of that step; None asks for no stop.
        meanwhile: what else happens during which step.
    """

    def __init__(self, steps: int | None, meanwhile: Mapping[int, Callable[[], object]]) -> None:
        super().__init__()
        self._steps, self._meanwhile, self._taken = steps, meanwhile, 0

    @property
    def requested(self) -> bool:
        """Asked once after every step."""
        self._taken += 1
        self._meanwhile.get(self._taken, lambda: None)()
        return self._taken == self._steps


def train_here(
    config: Config,
    *,
    stop_after: int | None = None,
    before: Callable[[], object] = lambda: None,
    meanwhile: Mapping[int, Callable[[], object]] | None = None,
) -> int:
    """Check the settings, then train on one process; return the exit code.

    Args:
        config: of the run.
        stop_after: steps after which it is asked to stop.
        before: called between the check and the training.
        meanwhile: called during the steps of these numbers.
    """
    directory, fingerprint = check_run(config, None)
    before()
    reporter = CrashReporter(0, None, alone=True)
    stop = StopAfter(stop_after, meanwhile or {})
    return train_in(directory, config, fingerprint, ALONE, reporter=reporter, stop=stop)
