"""Where a process stands among those that were started with it. Four ways, told apart here alone.

nothing set, launch.nproc_per_node=1    one process
nothing set, launch.nproc_per_node=N    this command starts N ranks on this machine
RANK set                                torchrun, or anything that sets its variables
a SLURM step of several tasks           srun or the SLURM launcher, with one task a GPU
"""

import re
from collections.abc import Mapping

from gns_pretrain.distributed.mesh import Place
from gns_pretrain.slurm import first_host


def place_from(environment: Mapping[str, str]) -> Place | None:
    """Where the launcher has put this process; None if nobody has."""
    if "RANK" in environment:
        ranks = int(environment["WORLD_SIZE"])
        return Place(
            rank=int(environment["RANK"]),
            num_ranks=ranks,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            ranks_per_node=int(environment.get("LOCAL_WORLD_SIZE", ranks)),
            rendezvous="env://",
        )
    # The step's own count: a job's SLURM_NTASKS is also set in its batch shell, outside any step.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return place_in_step(environment)
    return None


def place_in_step(environment: Mapping[str, str]) -> Place:
    """One task of a SLURM step; the ranks meet on its first node, at a port of the job."""
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    # Below the ports that Linux gives to whoever asks for any (32768 and up).
    port = environment.get("MASTER_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 12000
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    ranks = int(environment["SLURM_STEP_NUM_TASKS"])
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        num_ranks=ranks,
        local_rank=int(environment["SLURM_LOCALID"]),
        ranks_per_node=int(per_node[0]) if per_node else ranks,
        rendezvous=f"tcp://{host}:{port}",
    )
