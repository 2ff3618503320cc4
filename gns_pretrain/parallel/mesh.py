"""Ranks of a run, their devices, and the process group that joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, one_of
from gns_pretrain.system.processes import note_process_group


@dataclass
class ParallelSettings(Settings):
    """How the model and the batch are parallelized over ranks."""

    section: ClassVar[str] = "parallel"

    # auto: single on one process, else fsdp
    kind: Annotated[str, one_of("auto", "single", "ddp", "fsdp", "hsdp")] = "auto"
    # hsdp: ranks in a shard group; null: the ranks of a node
    shard_size: int | None = None
    # a collective that waits longer ends the run with an error
    timeout_seconds: Annotated[int, at_least(1, hint="600 is usual")] = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size is not None and self.kind != "hsdp":
            raise InputError(
                f"parallel.shard_size={self.shard_size} is for parallel=hsdp alone, this is "
                f"parallel={self.kind}; leave it out or use parallel=hsdp"
            )

    def resolved_kind(self, num_ranks: int) -> str:
        """Return the layout on `num_ranks` ranks, where `auto` is decided."""
        if self.kind == "auto":
            return "single" if num_ranks == 1 else "fsdp"
        return self.kind


@dataclass(frozen=True)
class RankInfo:
    """Rank, size and rendezvous of one process of a run, before it joins the others."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1
    rendezvous: str = ""  # tcp://host:port, or env:// when the launcher has set the variables


@dataclass(frozen=True)
class World:
    """One rank's view of the ranks of a run."""

    rank: int
    num_ranks: int
    device: torch.device
    kind: str  # single | ddp | fsdp | hsdp
    mesh: DeviceMesh | None = None  # None for a single process; 2-D (replicas, shards) for hsdp

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes files for all."""
        return self.rank == 0


def shard_group_size(settings: ParallelSettings, *, num_ranks: int, ranks_per_node: int) -> int:
    """Return how many ranks share one replica of the weights under hsdp.

    By default the ranks of a node, which has the fastest interconnect; on a single node half of
    its ranks, so that there is something to replicate.

    Raises:
        InputError: the ranks cannot be split into groups of that size.
    """
    size = settings.shard_size
    if size is None:
        size = ranks_per_node if num_ranks > ranks_per_node else max(num_ranks // 2, 1)
    if size < 1 or num_ranks % size:
        raise InputError(
            f"parallel.shard_size={size} does not divide the {num_ranks} ranks of this run; "
            f"use a divisor of {num_ranks}"
        )
    return size


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return a rank's device, for auto a GPU if torch sees one; InputError if GPUs are too few."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"launch.device={name} is not known; use one of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"launch.device={name} needs a GPU for each rank of a node, rank {local_rank} finds "
            f"{count}; lower launch.nproc_per_node or use launch.device=cpu"
        )
    return torch.device("cuda", local_rank)


# Groups of ranks on the CPU that were left, kept until the process ends. Whoever drops the last
# reference to one waits for its threads with the interpreter's lock in hand, and such a thread may
# want that lock to let go of a tensor: a rank that drops a DDP model right after a step can hang.
_LEFT: list[dist.ProcessGroup | None] = []


@contextmanager
def joined(place: RankInfo, settings: ParallelSettings, device: torch.device) -> Iterator[World]:
    """Join the other ranks for the length of the block; a single process joins nobody."""
    kind = settings.resolved_kind(place.num_ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if kind == "single":
        yield World(rank=0, num_ranks=1, device=device, kind=kind)
        return
    start_process_group(place, device, timedelta(seconds=settings.timeout_seconds))
    groups: list[dist.ProcessGroup | None] = [dist.group.WORLD]
    try:
        if kind == "hsdp":
            shards = shard_group_size(
                settings, num_ranks=place.num_ranks, ranks_per_node=place.ranks_per_node
            )
            shape = (place.num_ranks // shards, shards)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))
        else:
            mesh = init_device_mesh(device.type, (place.num_ranks,), mesh_dim_names=("shard",))
        groups += mesh.get_all_groups()
        yield World(place.rank, place.num_ranks, device, kind, mesh)
    finally:
        if device.type == "cpu":
            _LEFT.extend(groups)
        dist.destroy_process_group()


def start_process_group(place: RankInfo, device: torch.device, timeout: timedelta) -> None:
    """Rendezvous with the other ranks; on GPUs gloo serves tensors on the host beside NCCL."""
    note_process_group(place.num_ranks)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if place.num_ranks == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    on_this_machine = any(host in place.rendezvous for host in ("//127.0.0.1", "//localhost"))
    if on_this_machine and not os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.num_ranks,
        timeout=timeout,
    )
