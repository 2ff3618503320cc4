"""A user's optimizer with another fault in each of a job's first starts."""

import os
import signal
import time
from typing import Any

import torch

FAULTY_RANK = "1"
FAULTY_CALL = 9  # of `step`, which saving and loading call too: steps 8, 12 and 17


class Faulty(torch.optim.SGD):
    """SGD that raises in the first start, hangs in the second and is killed in the third."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if os.environ["SLURM_PROCID"] == FAULTY_RANK and self.calls == FAULTY_CALL:
            start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            if start == 0:
                raise ValueError("this rank has a fault")
            if start == 1:
                hang_forever()
            if start == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


def hang_forever() -> None:
    """As a read from a file server that has gone."""
    while True:
        time.sleep(3600)
