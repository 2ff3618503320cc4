"""Parallelizing a model, and where the entries of its weights and statistics are on every layout.

Rank r of S in a shard group has rows [r c, (r + 1) c) of a weight with m rows, c = ceil(m / S);
the last ranks may have fewer rows, or none. That is FSDP2's split. Statistics of the gradient are
sharded alike on every layout, so that they meet the gradient's own shard without communication.
Under tensor parallelism the same holds of each rank's part of the weight.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama, mark_batch_dynamic
from gns_pretrain.model.roles import clean_name, matrix_shape, replicated, unwrapped
from gns_pretrain.model.settings import OurModel
from gns_pretrain.parallel.mesh import World, same_ranks
from gns_pretrain.parallel.tensor import split_over_tensor_ranks

# What DDP calls the broadcast of buffers before a forward pass; torch 2.13 has deprecated the last.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class ShardLayout:
    """One rank's place among shards, replicas and tensor-parallel parts of a model.

    Ranks of one part see different samples (data parallel); the parts of a data-parallel rank see
    the same ones. Under DDP every rank has whole gradients, and statistics of its own shard alone.
    A group is None where it has one rank.
    """

    shard: int = 0  # this rank's place in its shard group
    num_shards: int = 1
    replica: int = 0  # which of the equal shard groups this is
    num_replicas: int = 1
    part: int = 0  # this rank's place in its tensor-parallel group
    num_parts: int = 1
    shard_group: ProcessGroup | None = None
    replica_group: ProcessGroup | None = None  # the ranks with the same shard
    data_group: ProcessGroup | None = None  # shards and replicas together
    tensor_group: ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """This rank's place among the data-parallel ranks, which see different samples."""
        return self.replica * self.num_shards + self.shard

    @property
    def num_data_ranks(self) -> int:
        return self.num_replicas * self.num_shards

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh | None, num_data_dims: int | None = None) -> "ShardLayout":
        """Return this rank's layout in a mesh.

        Args:
            mesh: of shards, or of (replicas, shards); a last dimension more are tensor-parallel
                parts. None for a single process.
            num_data_dims: dimensions before the parts; None for all of them.
        """
        if mesh is None or mesh.size() == 1:
            return cls()
        data = mesh.ndim if num_data_dims is None else num_data_dims
        if data > 2 or mesh.ndim - data > 1:
            raise InputError(
                f"the model is parallelized over a mesh of {tuple(mesh.shape)}; the noise scale "
                "takes up to two data-parallel dimensions and one of tensor parallelism"
            )
        dims = {"shard": data - 1, "replica": data - 2, "part": data}

        def place(name: str) -> tuple[int, int, ProcessGroup | None]:
            dim = dims[name]
            if not 0 <= dim < (mesh.ndim if name == "part" else data):
                return 0, 1, None
            size = mesh.size(dim)
            return mesh.get_local_rank(dim), size, mesh.get_group(dim) if size > 1 else None

        shard, num_shards, shard_group = place("shard")
        replica, num_replicas, replica_group = place("replica")
        part, num_parts, tensor_group = place("part")
        data_group = shard_group or replica_group
        if shard_group and replica_group:
            data_group = flattened(mesh, (data - 2, data - 1))
        return cls(
            shard=shard,
            num_shards=num_shards,
            replica=replica,
            num_replicas=num_replicas,
            part=part,
            num_parts=num_parts,
            shard_group=shard_group,
            replica_group=replica_group,
            data_group=data_group,
            tensor_group=tensor_group,
        )

    def apart(self, device: torch.device) -> "ShardLayout":
        """Return the layout with a shard group of its own; all ranks of the group together.

        What it reduces neither waits for other traffic nor delays it: FSDP2 gathers the next
        block's weights over the group that the model has. Safe with NCCL because every rank issues
        the collectives of both groups in one order, that of the backward pass. Where ranks leave
        out different weights, those of DDP come at other moments on each rank and could otherwise
        be mistaken for these.
        """
        if self.shard_group is None:
            return self
        own = same_ranks(self.shard_group, device)
        shared = self.data_group is self.shard_group
        return replace(self, shard_group=own, data_group=own if shared else self.data_group)

    @classmethod
    def of_model(cls, model: nn.Module, seen: dict[str, Tensor]) -> "ShardLayout":
        """Return this rank's layout of a plain model or one that DDP, FSDP2 or TP parallelized.

        Args:
            seen: of `unsharded_weights`.

        Raises:
            InputError: weights on different meshes, or weights that FSDP2 was told to ignore, whose
                gradients no rank reduces.
        """
        if (ddp := replicated(model)) is not None:
            group = ddp.process_group
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            several = group if size > 1 else None
            return cls(rank, size, shard_group=several, data_group=several)
        weights = {clean_name(n): w for n, w in unwrapped(model).named_parameters()}
        sharded = {name: w for name, w in weights.items() if isinstance(w, DTensor)}
        if not sharded:
            return cls()
        whole = max(sharded, key=lambda name: sharded[name].device_mesh.ndim)
        mesh, data_dims = sharded[whole].device_mesh, num_data_dims(sharded[whole], seen[whole])
        data_ranks = ranks_of(mesh, range(data_dims))
        for name, weight in weights.items():
            if not weight.requires_grad:
                continue
            if name not in sharded:
                if data_dims and mesh.size() > 1:
                    raise InputError(
                        f"{name} is not sharded while other weights are, so its gradient is not "
                        "reduced over ranks; let fully_shard manage it, or freeze it"
                    )
                continue
            its_dims = range(num_data_dims(sharded[name], seen[name]))
            if ranks_of(sharded[name].device_mesh, its_dims) != data_ranks:
                raise InputError(
                    f"{name} and {whole} are sharded over different ranks; the noise scale takes "
                    "one data-parallel mesh for all weights"
                )
        return cls.of_mesh(mesh, data_dims)

    def rows_of(self, shard: int, num_rows: int) -> slice:
        """Return the rows of a weight that rank `shard` of the group has; may be empty."""
        return chunk_of(shard, self.num_shards, slice(0, num_rows))


def num_data_dims(weight: Tensor, seen: Tensor) -> int:
    """Return how many mesh dimensions of a weight are data-parallel: FSDP2 gathers those.

    Args:
        weight: as the optimizer has it.
        seen: as forward and backward have it, still sharded over tensor-parallel ranks.
    """
    assert isinstance(weight, DTensor)
    return weight.device_mesh.ndim - (seen.device_mesh.ndim if isinstance(seen, DTensor) else 0)


def ranks_of(mesh: DeviceMesh, dims: Iterable[int]) -> list[int]:
    """Return the ranks that differ from this one in the given dimensions alone, in their order."""
    place = mesh.get_coordinate()
    assert place is not None
    chosen = set(dims)
    index = tuple(slice(None) if dim in chosen else place[dim] for dim in range(mesh.ndim))
    ranks: list[int] = mesh.mesh[index].flatten().tolist()
    return ranks


def flattened(mesh: DeviceMesh, dims: tuple[int, ...]) -> ProcessGroup:
    """Return the group of the ranks along several dimensions of a mesh, made once."""
    if mesh.ndim == len(dims) and mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
        assert group is not None
        return group
    names = mesh.mesh_dim_names
    if names is None:
        raise InputError(
            f"the device mesh of shape {tuple(mesh.shape)} has no mesh_dim_names, and ranks along "
            "several of its dimensions must meet; name them in init_device_mesh"
        )
    some = mesh if mesh.ndim == len(dims) else mesh[tuple(names[dim] for dim in dims)]
    return some._flatten().get_group()


def replica_group(model: nn.Module) -> ProcessGroup | None:
    """Return the ranks among which DDP replicates a model; None for any other layout."""
    ddp = replicated(model)
    return ddp.process_group if ddp is not None else None


def unsharded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what autograd reaches for each weight: FSDP2 swaps it in for forward and backward.

    These tensors stay the same objects when they are sharded and unsharded again (an
    implementation fact of torch 2.11 to 2.13, asserted by a test), so one look at the start serves
    every later step. All ranks call it together.
    """
    inner = unwrapped(model)
    weights: dict[str, Tensor] = {clean_name(n): w for n, w in inner.named_parameters()}
    for prefix, module in inner.named_modules():
        if isinstance(module, FSDPModule) and isinstance(module, nn.Module):
            sharded = dict(module.named_parameters())
            module.unshard()
            for name, weight in module.named_parameters():
                if weight is not sharded[name]:  # its own, not those of FSDP2 units within
                    weights[clean_name(f"{prefix}.{name}" if prefix else name)] = weight
            module.reshard()
    return weights


def chunk_of(index: int, count: int, whole: slice) -> slice:
    """Return the piece of a range that one of `count` ranks has, as torch.chunk splits it."""
    size = rows_per_shard(whole.stop - whole.start, count)
    start = min(whole.start + index * size, whole.stop)
    return slice(start, min(start + size, whole.stop))


Region = tuple[slice, slice]  # rows and columns of a matrix


@dataclass(frozen=True)
class MatrixShards:
    """Which region of a weight's matrix view each rank of a group has, and the group.

    Ranks outside the group that have the same region have it twice (replicas).
    """

    shape: tuple[int, int]  # rows and columns of the whole matrix
    regions: tuple[Region, ...]  # by rank of the group; may be empty ones
    rank: int = 0  # this rank's place in the group
    group: ProcessGroup | None = None  # None where this rank has all

    @classmethod
    def of_rows(cls, shape: tuple[int, int], layout: ShardLayout) -> "MatrixShards":
        """Rows split over the shard group, as FSDP2 splits a weight and DDP its statistics."""
        columns = slice(0, shape[1])
        regions = [(layout.rows_of(r, shape[0]), columns) for r in range(layout.num_shards)]
        return cls(shape, tuple(regions), layout.shard, layout.shard_group)

    @classmethod
    def of_weight(cls, weight: Tensor) -> "MatrixShards":
        """The shards of a weight by its own placements: FSDP2, tensor parallel or both.

        Raises:
            InputError: it is sharded along a dimension that its matrix view splits.
        """
        shape = matrix_shape(weight)
        whole = (slice(0, shape[0]), slice(0, shape[1]))
        if not isinstance(weight, DTensor):
            return cls(shape, (whole,))
        mesh = weight.device_mesh
        splits = [
            (dim, placement)
            for dim, placement in enumerate(weight.placements)
            if not placement.is_replicate() and mesh.size(dim) > 1
        ]
        if not splits:
            return cls(shape, (whole,))
        for _, placement in splits:
            if placement_dim(placement) > 1:
                raise InputError(
                    f"a weight of shape {list(weight.shape)} has the placement {placement}; as a "
                    "matrix it can be sharded along its first or second dimension"
                )
        # FSDP2 chunks what tensor parallelism has split before, wherever its mesh dimension stands.
        splits.sort(key=lambda split: hasattr(split[1], "split_factor"))
        dims = tuple(sorted(dim for dim, _ in splits))
        group = mesh.get_group(dims[0]) if len(dims) == 1 else flattened(mesh, dims)

        def region(rank: int) -> Region:
            place = (mesh.mesh == rank).nonzero()[0].tolist()
            pieces = list(whole)
            for dim, placement in splits:
                axis = placement_dim(placement)
                unit = weight.shape[1:].numel() // weight.shape[1] if axis else 1
                span = slice(pieces[axis].start // unit, pieces[axis].stop // unit)
                piece = chunk_of(place[dim], mesh.size(dim), span)
                pieces[axis] = slice(piece.start * unit, piece.stop * unit)
            return pieces[0], pieces[1]

        regions = tuple(region(rank) for rank in dist.get_process_group_ranks(group))
        return cls(shape, regions, dist.get_rank(group), group)

    @property
    def region(self) -> Region:
        """This rank's."""
        return self.regions[self.rank]


def placement_dim(placement: Placement) -> int:
    """Return the tensor's dimension that a sharded placement splits."""
    # By attribute: FSDP2's own kind, beside tensor parallelism, is no `Shard` in torch 2.13.
    dim: int = getattr(placement, "dim")  # noqa: B009
    return dim


def region_shape(region: Region) -> tuple[int, int]:
    rows, columns = region
    return rows.stop - rows.start, columns.stop - columns.start


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local shard of each weight or gradient, a plain tensor on the same memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def shard_groups(tensor: Tensor, *, along: slice = slice(None)) -> tuple[ProcessGroup, ...]:
    """Return the groups over which a tensor is sharded, one for each dimension of its mesh.

    Args:
        along: those that split one of these dimensions of the tensor alone.
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh, wanted = tensor.device_mesh, range(tensor.ndim)[along]
    sharded = [
        dim
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and placement_dim(placement) in wanted
    ]
    return tuple(mesh.get_group(dim) for dim in sharded if mesh.size(dim) > 1)


def rows_per_shard(num_rows: int, num_shards: int) -> int:
    """Return the number of rows of every shard but the last ones."""
    return -(-num_rows // num_shards)


def packed(tensors: list[Tensor], num_shards: int) -> Tensor:
    """Pack whole tensors [m_i, ...] into a buffer whose row r is for shard r of S, as FSDP2 does.

    Returns:
        [S, sum_i ceil(m_i / S) * rest_i], float32, padded with zeros.
    """
    tensors = [t.contiguous() for t in tensors if t.numel()]
    if len({t.dtype for t in tensors}) > 1:
        tensors = [t.float() for t in tensors]
    width = sum(rows_per_shard(len(t), num_shards) * t[0].numel() for t in tensors)
    buffer = tensors[0].new_empty(num_shards, width, dtype=torch.float32)
    torch._chunk_cat(tensors, 0, num_shards, out=buffer)
    return buffer


def parallelize(model: OurModel, world: World, *, compute_dtype: torch.dtype) -> nn.Module:
    """Parallelize the model over the ranks of `world`.

    Weights, their gradients' reduction and the optimizer's state stay float32 on every layout;
    `compute_dtype`, float32 or bfloat16, is that of the copies that forward and backward use.

    Args:
        model: on the world's device, float32, with the same values on every rank.
    """
    model.compute_dtype = compute_dtype
    if world.kind == "single":
        return model
    if world.kind == "ddp":
        options: dict[str, Any] = {SYNC_BUFFERS: False}  # `running_statistics` keeps them the same
        return DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # The rotary tables travel as inputs of each block and must stay float32.
        cast_forward_inputs=False,
    )
    if world.tensor_size > 1:
        assert world.mesh is not None
        assert isinstance(model, Llama)
        split_over_tensor_ranks(model, world.mesh["tensor"])
    for block in model.layers:
        fully_shard(block, mesh=world.data_mesh, mp_policy=precision)
        if model.blocks_compiled:
            # After FSDP2's own hook, which hands the block another tensor, without the mark.
            block.register_forward_pre_hook(torch._dynamo.disable(mark_input_dynamic))
    # What is in no block stays in the root's group; of a Llama a tied weight has two uses.
    fully_shard(model, mesh=world.data_mesh, mp_policy=precision)
    return model


def mark_input_dynamic(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """`mark_batch_dynamic` as a forward pre-hook of a block; the compiler must not trace it."""
    mark_batch_dynamic(inputs[0])


def reshard(model: nn.Module) -> None:
    """Let forward passes gather anew what FSDP2 has gathered, after weights have changed.

    The root's weights stay gathered after a forward pass without a backward one.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gradient_synchronisation(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Set whether backward passes in this block reduce gradients over ranks or only accumulate."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield
