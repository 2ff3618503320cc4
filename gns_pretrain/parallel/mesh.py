"""Who takes part in a run: ranks, devices and the process group that joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gns_pretrain.errors import InputError

KINDS = ("auto", "single", "ddp", "fsdp", "hsdp")


@dataclass
class ParallelSettings:
    """How the model and the batch are laid over ranks."""

    kind: str = "auto"  # auto (single on one process, else fsdp) | single | ddp | fsdp | hsdp
    shard_size: int | None = None  # hsdp: ranks in a shard group; null: the ranks of a node
    timeout_seconds: int = 600  # a collective that waits longer ends the run with an error

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        if self.kind not in KINDS:
            raise InputError(
                f"parallel.kind={self.kind} is not known; use one of {', '.join(KINDS)}"
            )
        if self.shard_size is not None and self.kind != "hsdp":
            raise InputError(
                f"parallel.shard_size={self.shard_size} is for parallel=hsdp alone, this is "
                f"parallel={self.kind}; leave it out or use parallel=hsdp"
            )
        if self.timeout_seconds < 1:
            raise InputError(
                f"parallel.timeout_seconds={self.timeout_seconds} must be at least 1; 600 is usual"
            )

    def resolved_kind(self, num_ranks: int) -> str:
        """The layout on `num_ranks` ranks; `auto` is decided here."""
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
    """The ranks of a run as one of them sees it."""

    rank: int
    num_ranks: int
    device: torch.device
    kind: str  # single | ddp | fsdp | hsdp
    mesh: DeviceMesh | None = None  # None for a single process; 2-D (replicas, shards) for hsdp

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0


def shard_group_size(settings: ParallelSettings, *, num_ranks: int, ranks_per_node: int) -> int:
    """Ranks that share one copy of the weights under hsdp.

    By default the ranks of a node, whose links are the fastest; on a single node half of its
    ranks, so that there is something to replicate.

    Raises:
        InputError: the ranks cannot be split into groups of that size.
    """
    if settings.shard_size is not None:
        size = settings.shard_size
    else:
        size = ranks_per_node if num_ranks > ranks_per_node else max(num_ranks // 2, 1)
    if size < 1 or num_ranks % size:
        raise InputError(
            f"parallel.shard_size={size} does not divide the {num_ranks} ranks of this run; "
            f"use a divisor of {num_ranks}"
        )
    return size


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of a process: `auto` takes a GPU where torch sees one.

    Raises:
        InputError: more ranks than GPUs, or a GPU was asked for and there is none.
    """
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
    """Rendezvous with the other ranks; gloo stands beside NCCL for what lives on the host."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if place.num_ranks == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if is_local(place.rendezvous) else "")
    if not os.environ["GLOO_SOCKET_IFNAME"]:
        del os.environ["GLOO_SOCKET_IFNAME"]
    dist.init_process_group(
        backend,
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.num_ranks,
        timeout=timeout,
    )


def is_local(rendezvous: str) -> bool:
    """Whether all ranks meet on this machine's loopback."""
    return "//127.0.0.1" in rendezvous or "//localhost" in rendezvous
