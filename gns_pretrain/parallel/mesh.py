"""Ranks of a run, their devices, and the process group that joins them."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Annotated, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gns_pretrain.errors import InputError, printable
from gns_pretrain.fields import Settings, at_least, at_most, one_of
from gns_pretrain.system.processes import note_process_group

NOTICE_SECONDS = 10.0  # after which a rank says for whom it waits
NO_RENDEZVOUS = "this rank has not met"  # begins the error of one that waited in vain
YEAR_SECONDS = 366 * 24 * 3600


@dataclass
class ParallelSettings(Settings):
    """How the model and the batch are parallelized over ranks."""

    section: ClassVar[str] = "parallel"

    # auto: single on one process, else fsdp
    kind: Annotated[str, one_of("auto", "single", "ddp", "fsdp", "hsdp")] = "auto"
    # hsdp: ranks in a shard group; null: the ranks of a node
    shard_size: int | None = None
    # fsdp, hsdp: ranks that compute each block together on the same sequences (tensor parallelism);
    # neighbours, so that they are of one node
    tensor_size: Annotated[int, at_least(1, hint="1 is no tensor parallelism")] = 1
    # a collective that waits longer ends the run with an error
    timeout_seconds: Annotated[int, at_least(1, hint="600 is usual"), at_most(YEAR_SECONDS)] = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size is not None and self.kind != "hsdp":
            raise InputError(
                f"parallel.shard_size={self.shard_size} is for parallel=hsdp alone, this is "
                f"parallel={self.kind}; leave it out or use parallel=hsdp"
            )
        if self.tensor_size > 1 and self.kind in ("single", "ddp"):
            raise InputError(
                f"parallel.tensor_size={self.tensor_size} is for parallel=fsdp and hsdp, this is "
                f"parallel={self.kind}; use one of them, or parallel.tensor_size=1"
            )

    def num_data_ranks(self, num_ranks: int) -> int:
        """Return how many ranks, or groups of tensor-parallel ranks, see different sequences.

        Raises:
            InputError: the ranks cannot be split into tensor-parallel groups.
        """
        if num_ranks % self.tensor_size:
            raise InputError(
                f"parallel.tensor_size={self.tensor_size} does not divide the number of ranks, "
                f"{num_ranks}; use a divisor of it, or another number of ranks"
            )
        return num_ranks // self.tensor_size

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
    # (replica,) shard (, tensor), the first for hsdp; None for a single process
    mesh: DeviceMesh | None = None
    tensor_size: int = 1  # neighbouring ranks that see the same sequences
    # of what goes through the host: flags and objects; None: the default group
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes files for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This rank's place among those that see different sequences."""
        return self.rank // self.tensor_size

    @property
    def num_data_ranks(self) -> int:
        return self.num_ranks // self.tensor_size

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The ranks that have the same part of the weights, over which they are sharded."""
        if self.mesh is None or self.tensor_size == 1:
            return self.mesh
        assert self.mesh.mesh_dim_names is not None
        return self.mesh[self.mesh.mesh_dim_names[:-1]]


def shard_group_size(settings: ParallelSettings, *, num_ranks: int, ranks_per_node: int) -> int:
    """Return how many data-parallel ranks share one replica of the weights under hsdp.

    By default those of a node, which has the fastest interconnect; on a single node half of them,
    so that there is something to replicate.

    Args:
        num_ranks: all ranks, tensor-parallel ones included.
        ranks_per_node: likewise.

    Raises:
        InputError: the ranks cannot be split into groups of that size.
    """
    data_ranks = settings.num_data_ranks(num_ranks)
    size = settings.shard_size
    if size is None:
        per_node = max(ranks_per_node // settings.tensor_size, 1)
        size = per_node if data_ranks > per_node else max(data_ranks // 2, 1)
    if size < 1 or data_ranks % size:
        ranks = f"the {num_ranks} ranks of this run"
        if settings.tensor_size > 1:
            ranks = (
                f"the {data_ranks} data-parallel ranks of this run ({num_ranks} ranks, "
                f"parallel.tensor_size={settings.tensor_size})"
            )
        raise InputError(
            f"parallel.shard_size={size} does not divide {ranks}; use a divisor of {data_ranks}"
        )
    return size


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return a rank's device, for auto a GPU if torch sees one; InputError if GPUs are too few.

    A SLURM task that sees one GPU takes it: the cluster may have bound one to each.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"launch.device={name} is not known; use one of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise InputError(
            f"launch.device={name} needs a GPU for each rank of a node, rank {local_rank} finds "
            f"{count}; lower launch.nproc_per_node, use launch.device=cpu, or in SLURM request "
            "--gpus-per-node=N or --gpus-per-task=1"
        )
    return torch.device("cuda", local_rank)


# Groups of ranks on the CPU that were left or will be, kept until the process ends. Whoever drops
# the last reference to one waits for its threads with the interpreter's lock in hand, and such a
# thread may want that lock to let go of a tensor: a rank that drops a DDP model right after a step
# can hang.
_LEFT: list[dist.ProcessGroup | None] = []


def same_ranks(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Make another group of the same ranks, with the same timeout; all of them together."""
    options = getattr(group._get_backend(device), "options", None)
    made = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=options._timeout if options else None,
        use_local_synchronization=True,
    )
    _LEFT.append(made)
    return made


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
        sizes = {"shard": settings.num_data_ranks(place.num_ranks)}
        if kind == "hsdp":
            shards = shard_group_size(
                settings, num_ranks=place.num_ranks, ranks_per_node=place.ranks_per_node
            )
            sizes = {"replica": sizes["shard"] // shards, "shard": shards}
        if settings.tensor_size > 1:
            sizes["tensor"] = settings.tensor_size
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        groups += mesh.get_all_groups()
        yield World(place.rank, place.num_ranks, device, kind, mesh, settings.tensor_size)
    finally:
        if device.type == "cpu":
            _LEFT.extend(groups)
        dist.destroy_process_group()


def beside_training(world: World, settings: ParallelSettings) -> World:
    """Return the world of a thread beside training, with a gloo group of its own.

    In one group the collectives of two threads could meet in another order on another rank, and
    wait for ever. All ranks call this.
    """
    if world.mesh is None:
        return world
    timeout = timedelta(seconds=settings.timeout_seconds)
    group = dist.new_group(backend="gloo", timeout=timeout)
    _LEFT.append(group)
    return replace(world, group=group)


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
    others = f"the {place.num_ranks - 1} others at {meeting_point(place)}"
    line = (
        f"rank {place.rank} waits for {others}, {timeout.total_seconds():.0f} s at most; every "
        "rank has to run this command"
    )
    # Not by system.terminal: the library comes here without rich.
    notice = threading.Timer(NOTICE_SECONDS, lambda: print(printable(line), flush=True))
    notice.daemon = True
    if place.local_rank == 0:
        notice.start()
    try:
        dist.init_process_group(
            backend,
            init_method=place.rendezvous,
            rank=place.rank,
            world_size=place.num_ranks,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{NO_RENDEZVOUS} {others}: {str(error).splitlines()[0]} Start all ranks; where a "
            "node's own name is a loopback address, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "to the network interface between nodes"
        ) from error
    finally:
        notice.cancel()


def meeting_point(place: RankInfo) -> str:
    """Where the ranks meet: host:port."""
    if place.rendezvous == "env://":
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return place.rendezvous.partition("://")[2]
