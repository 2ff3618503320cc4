"""What inductor makes of a function, without generating code: kernels, bytes, what is saved.

The function is traced on fake tensors on the CPU, and torch's own compiler decides what the forward
pass saves for the backward pass, what is fused and in which order kernels run; only their code is
left out. Its scheduler for CPUs stands for that of GPUs, which fuses the same operators but for
details, and whose kernels need Triton and a GPU.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, memory
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

MATMUL, ATTENTION, ELEMENTWISE = "matmul", "attention", "element-wise"


@dataclass(frozen=True)
class LoweredKernel:
    """One kernel of a compiled graph."""

    kind: str  # MATMUL, ATTENTION or ELEMENTWISE (reductions too)
    bytes: int  # read and written
    flops: int = 0


@dataclass(frozen=True)
class LoweredGraph:
    """A compiled graph."""

    kernels: tuple[LoweredKernel, ...]
    # What it writes: shape and dtype of each storage; not what it passes on of its inputs.
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    transient: int  # bytes above its inputs at its peak, its outputs among them


def lowered(
    make_module: Callable[[], nn.Module], make_inputs: Callable[[], list[Tensor]]
) -> list[LoweredGraph]:
    """Compile a module; return its graphs of the forward and of the backward pass.

    Args:
        make_module, make_inputs: make them on the CPU, under FakeTensorMode.
    """
    graphs: list[LoweredGraph] = []

    def keep(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        with _disable_current_modes():
            graphs.append(analysed(module, inputs, bool(options.get("is_backward"))))

        def run(arguments: list[Any]) -> Any:
            return module(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch._dynamo.reset()
    with FakeTensorMode():
        inputs = make_inputs()
        compiled = torch.compile(
            make_module(),
            backend=lambda module, given: compile_fx.compile_fx(module, given, inner_compile=keep),
            dynamic=False,
        )
        compiled(*inputs).sum().backward()
    torch._dynamo.reset()
    return graphs


def analysed(module: torch.fx.GraphModule, inputs: Any, is_backward: bool) -> LoweredGraph:
    """Schedule a graph as inductor does before it generates code."""
    outputs = new_storages(module)
    module = copy.deepcopy(module)
    compile_fx.view_to_reshape(module)
    with torch.no_grad():
        mode = compile_fx.fake_tensor_prop(module, inputs)
    compile_fx._recursive_record_original_output_strides(module)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(module, is_inference=False)
    graph = GraphLowering(module, shape_env=mode.shape_env, is_backward=is_backward)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        graph._update_scheduler()
        scheduler = graph.scheduler
        kernels = [kernel_of(node) for node in scheduler.nodes]
        freeable = memory.get_freeable_input_buf(
            scheduler.nodes, OrderedSet(graph.graph_inputs.keys())
        )
        memory.assign_memory_planning_info_for_scheduler_buffers(
            scheduler.nodes, scheduler.name_to_buf
        )
        memory.assign_memory_planning_info_for_scheduler_nodes(
            scheduler.nodes, scheduler.name_to_fused_node, scheduler.name_to_buf, freeable
        )
        peak, *_ = memory.estimate_peak_memory_allocfree(
            scheduler.nodes, freeable, OrderedSet(graph.get_output_names())
        )
        given = sum(buffer.mpi_buffer.size_free for buffer in freeable.values())
    return LoweredGraph(tuple(k for k in kernels if k.bytes), outputs, peak - given)


def kernel_of(node: Any) -> LoweredKernel:
    moved = node.get_read_write_buffers_sizes()
    name = getattr(node.node, "python_kernel_name", None) or ""
    if "attention" in name:
        return LoweredKernel(ATTENTION, moved, attention_flops(node.node))
    if "extern_kernels" in name:
        return LoweredKernel(MATMUL, moved, matmul_flops(node.node))
    return LoweredKernel(ELEMENTWISE, moved)


def matmul_flops(kernel: Any) -> int:
    left = [value for value in kernel.inputs if len(value.get_size()) >= 2][-2]
    return 2 * int(math.prod(kernel.get_size())) * int(left.get_size()[-1])


def attention_flops(kernel: Any) -> int:
    """Causal: two products of half a [T, T] matrix forward, five backward."""
    backward = "backward" in kernel.python_kernel_name
    batch, heads, tokens, width = map(int, kernel.inputs[1 if backward else 0].get_size())
    return (5 if backward else 2) * batch * heads * tokens * tokens * width


def new_storages(module: torch.fx.GraphModule) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shape and dtype of the storages that a graph returns beside those it was given."""
    known = set()
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            known.add(value.untyped_storage()._cdata)
    found = []
    (returned,) = module.graph.find_nodes(op="output")
    for node in returned.args[0]:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known:
            known.add(value.untyped_storage()._cdata)
            found.append((tuple(map(int, value.shape)), value.dtype))
    return tuple(found)
