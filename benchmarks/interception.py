"""One rank of many on a FakeGPU: how torch's operators and collectives reach it.

Tensors have shapes and dtypes but no memory (torch's FakeTensorMode) and say that they are on
`cuda:0`, so the project's own code takes the branches that it takes on a GPU; the other ranks are
torch's fake process group.

Not seen: DDP's reducer, which is C++, and anything that depends on a tensor's values: those read on
the host are zeros, conditions hold, and lists of places are 0, 1, 2, ...
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.fake_gpu import DEVICE, FakeGPU, Kernel, Work, caller
from gns_pretrain.errors import InputError
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined

# Operators after which the host has waited for the device, where their inputs are there.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::_linalg_eigh",
    "aten::_linalg_check_errors",
}
# Reading nothing: an allocation, or what is known without the device.
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
NO_KERNEL |= {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::resize_", "aten::set_"}
# Operators that only write what they change in place.
ONLY_WRITING = ("copy_", "fill_", "zero_", "chunk_cat", "_out", "normal_", "scatter_")
REDUCTIONS = {"aten::sum", "aten::linalg_vector_norm"}
MATMULS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm"}
# FLOPs over n^3 of an [n, n] matrix.
FACTORIZATIONS = {"aten::linalg_cholesky_ex": 1 / 3, "aten::_linalg_eigh": 9.0}
# A multi-tensor kernel takes at most so many tensors, and blocks of so many entries.
TENSORS_A_LAUNCH, BLOCKS_A_LAUNCH, BLOCK_ENTRIES = 110, 320, 2**16


class Watch(TorchDispatchMode):
    """Passes every operator to a FakeGPU; tensors on the host are real and stay out of it."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fake tensors and record what it does."""
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come here by themselves
        name = func._schema.name
        if name == "prim::device":
            return func(*args)
        inputs = tensors_in(args, kwargs)
        fake: list[Tensor] = [tensor for tensor in inputs if isinstance(tensor, FakeTensor)]
        if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        assert not name.startswith("c10d::"), f"{name} is a collective that nobody has modelled"
        self._note_waits(name, args, kwargs)
        if name == "aten::nonzero":
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        if name == "aten::_local_scalar_dense":
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if name == "aten::_to_copy" and fake and is_on_host(kwargs.get("device")):
            return stand_in(args[0], kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        self._record(func, name, args, kwargs, fake, tensors_in(result))
        return result

    def _note_waits(self, name: str, args: Any, kwargs: Any) -> None:
        what = name.removeprefix("aten::")
        if name in WAITING:
            self.gpu.wait(what)
        elif name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            target = args[0].device if name == "aten::copy_" else kwargs.get("device")
            pending = args[2:3] == (True,) or kwargs.get("non_blocking", False)
            there, here = (
                is_on_host(device) for device in (source.device, target or source.device)
            )
            if there != here and not (pending and (here or source.is_pinned())):
                self.gpu.wait("a copy to the host" if here else "a copy from the host")
        elif name in ("aten::index", "aten::index_put_"):
            for index in tensors_in(args[1]):
                if is_on_host(index.device) or index.dtype == torch.bool:
                    self.gpu.wait(f"{what} by a list or mask")

    def _record(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        gpu = self.gpu
        part, holder = caller()
        outputs = [tensor for tensor in outputs if isinstance(tensor, FakeTensor)]
        for tensor in (*inputs, *outputs):
            gpu.storage_of(tensor, holder)
        if func.is_view or name in NO_KERNEL:
            return
        changed: dict[int, Tensor] = {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                changed |= {id(tensor): tensor for tensor in tensors_in(value)}
        only_read = [tensor for tensor in inputs if id(tensor) not in changed]
        new = [tensor for tensor in outputs if id(tensor) not in changed]
        written = [*changed.values(), *new]
        if name in ("aten::embedding", "aten::gather", "aten::index", "aten::scatter_"):
            # Only the entries that an index names.
            moved = 2 * sum(map(span, new)) if new else 3 * span(only_read[-1])
        else:
            moved = sum(map(span, only_read)) + sum(map(span, written))
            if not name.endswith(ONLY_WRITING):
                moved += sum(map(span, changed.values()))
        if any(is_on_host(tensor.device) for tensor in (*inputs, *new)):
            moved = 0  # over PCIe, beside the device's own work
        wide = kwargs.get("dtype")
        if name in REDUCTIONS and wide and only_read[0].dtype.itemsize < wide.itemsize:
            # A reduction to a wider dtype first writes a copy of its input in that dtype.
            copy = only_read[0].numel() * wide.itemsize
            gpu.reach(copy, holder)
            moved += 2 * copy
        flops, unit = computation(name, args, written)
        gpu.recording.kernels.append(
            Kernel(
                part,
                name,
                moved,
                flops,
                unit,
                launches(name, args),
            )
        )
        gpu.access(gpu.stream, only_read, written, f"{name} ({part})")


def is_on_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments, and in lists and dictionaries of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def span(tensor: Tensor) -> int:
    """Bytes that a tensor names: an expanded one has fewer than its shape says."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def computation(name: str, args: Any, outputs: list[Tensor]) -> tuple[int, str]:
    """Return the FLOPs of an operator, 0 where memory bounds it, and what computes them."""
    if name in MATMULS:
        left = args[0] if name in ("aten::mm", "aten::bmm") else args[1]
        return 2 * outputs[0].numel() * left.shape[-1], str(left.dtype).removeprefix("torch.")
    if name in FACTORIZATIONS:
        return round(FACTORIZATIONS[name] * args[0].numel() * args[0].shape[-1]), "factorization"
    return 0, "float32"


def launches(name: str, args: Any) -> int:
    """Return the kernels of an operator: a multi-tensor one takes so many tensors in each."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and tensors_in(value)]
    if not name.startswith(("aten::_foreach", "aten::_fused")) or not lists:
        return 1
    blocks = sum(-(-tensor.numel() // BLOCK_ENTRIES) for tensor in tensors_in(lists[0]))
    return max(-(-len(lists[0]) // TENSORS_A_LAUNCH), -(-blocks // BLOCKS_A_LAUNCH), 1)


def stand_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a host tensor for one whose values nobody knows: zeros, true, or places in a list."""
    with _disable_current_modes():
        if dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=dtype)
        if tensor.ndim == 1 and not dtype.is_floating_point:
            return torch.arange(len(tensor), dtype=dtype)
        return torch.zeros(tensor.shape, dtype=dtype)


class OnDevice(FakeTensorMode):
    """Fake tensors on `cuda` for a build of torch that may have none.

    Python sees `cuda`, and torch's C++ sees `meta`: its autograd engine needs a device to be there
    to run the backward pass on it. What C++ then makes on `meta` is the device's.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on shapes alone."""
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        kwargs = dict(kwargs or {})
        device = torch.device(kwargs.get("device") or DEVICE)
        if device.type == "meta" and not self.in_kernel_invocation:
            kwargs["device"] = DEVICE
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def one_rank_of(
    num_ranks: int, parallel: ParallelSettings, *, ranks_per_node: int = 8
) -> Iterator[tuple[World, FakeGPU]]:
    """Be rank 0 of `num_ranks` GPUs for the length of the block; nothing is left behind.

    Args:
        parallel: DDP is refused, whose reducer would not be seen.
    """
    kind = parallel.resolved_kind(num_ranks)
    if kind == "ddp":
        raise InputError(
            "parallel.kind=ddp reduces gradients in C++, which is not seen here; "
            "use single, fsdp or hsdp"
        )
    gpu = FakeGPU()
    place = RankInfo(0, num_ranks, 0, min(num_ranks, ranks_per_node))

    def start(*_: Any) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)

    with ExitStack() as stack:
        stack.enter_context(patch("gns_pretrain.parallel.mesh.start_process_group", start))
        for name, value in vars(gpu.handle()).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name, collective in COLLECTIVES.items():
            if real := getattr(dist, name, None):
                stack.enter_context(patch.object(dist, name, recorded(gpu, real, collective)))
        for function in ("alloc_storage", "free_storage"):
            for module in (_fsdp_param, _fsdp_param_group):
                if real := getattr(module, function, None):
                    stack.enter_context(patch.object(module, function, followed(gpu, real)))
        stack.enter_context(patch.object(FakeTensor, "__torch_dispatch__", meta_to_cpp()))
        on_gpu = property(lambda tensor: tensor.device.type == "cuda")
        stack.enter_context(patch.object(FakeTensor, "is_cuda", on_gpu))
        of_shard = property(lambda tensor: tensor._local_tensor.device)
        stack.enter_context(patch.object(DTensor, "device", of_shard, create=True))
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda t: t.cpu().tolist()))
        world = stack.enter_context(joined(place, parallel, DEVICE))
        stack.enter_context(OnDevice())
        stack.enter_context(Watch(gpu))
        yield world, gpu


def meta_to_cpp() -> Any:
    """Return FakeTensor's dispatch, but for its device, which C++ asks for and Python does not."""
    real = FakeTensor.__torch_dispatch__

    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        return real(func, types, args, kwargs or {})

    return classmethod(dispatch)


def followed(gpu: FakeGPU, real: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Let the memory's record follow what FSDP2 does to a storage by itself."""

    def resize(tensor: Tensor) -> None:
        gpu.storage_of(tensor, "gathered weights")
        real(tensor)
        gpu.resized(tensor)

    return resize


# What leaves a rank, as a multiple of (n - 1) / n of which argument, and the arguments that are
# read and written; a ring's traffic.
COLLECTIVES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...], float]] = {
    name: (kind, counted, reads, writes, factor)
    for names, kind, counted, reads, writes, factor in (
        (
            ("all_gather_single", "all_gather_into_tensor"),
            "all-gather",
            "output_tensor",
            ("input_tensor",),
            ("output_tensor",),
            1.0,
        ),
        (
            ("reduce_scatter_single", "reduce_scatter_tensor"),
            "reduce-scatter",
            "input",
            ("input",),
            ("output",),
            1.0,
        ),
        (("all_reduce",), "all-reduce", "tensor", ("tensor",), ("tensor",), 2.0),
        (("reduce",), "reduce", "tensor", ("tensor",), ("tensor",), 1.0),
        (("broadcast",), "broadcast", "tensor", ("tensor",), ("tensor",), 1.0),
        (("all_to_all_single",), "all-to-all", "input", ("input",), ("output",), 1.0),
    )
    for name in names
}


def recorded(gpu: FakeGPU, real: Any, collective: Any) -> Callable[..., Work | None]:
    """Put a FakeGPU in the place of one of torch.distributed's collectives."""
    kind, counted, reads, writes, factor = collective
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given[counted], FakeTensor):
            return real(*args, **kwargs)
        group = given.get("group") or dist.group.WORLD
        assert group is not None
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        whole = given[counted].numel() * given[counted].itemsize
        sent = whole * (size - 1) / size
        if splits := given.get("input_split_sizes"):
            sent = whole * (1 - splits[rank] / max(sum(splits), 1))
        return gpu.collective(
            kind,
            factor * sent,
            [given[name] for name in reads],
            [given[name] for name in writes],
            group,
            given.get("async_op", False),
        )

    return call
