"""Tensor parallelism of a Llama: its ranks see the same sequences and share each block's matmuls.

    wq, wk, wv, w1, w3    rows, so that each rank computes its own heads and hidden units
    wo, w2                columns, so that each rank's product is one term of the output's sum
    the others            on every rank, whole

A block takes two all-reduces of [B, T, D] in the forward pass and two in the backward pass. Every
parameter is a DTensor of the same meshes, which the fused and foreach kernels of torch.optim need.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from gns_pretrain.model.llama import Llama


class Replicated(ParallelStyle):
    """A module that every rank computes alike, with all of its weights."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def to_dtensor(module: nn.Module, inputs: tuple[Any], mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

        def to_local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, to_dtensor, to_local)


def split_over_tensor_ranks(model: Llama, mesh: DeviceMesh) -> None:
    """Split the blocks' matrices over the ranks of a 1-D mesh; FSDP2 comes after.

    Args:
        model: with the same values on every rank.
    """
    # Once for wq, wk and wv together, and for w1 and w3: their gradients' sum is reduced once.
    attention_input = PrepareModuleInput(
        input_layouts=(Replicate(), None, None, None),
        desired_input_layouts=(Replicate(), None, None, None),
    )
    feed_forward_input = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
    )
    block_plan: dict[str, ParallelStyle] = {
        "attention_norm": Replicated(),
        "attention": attention_input,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(),
        "feed_forward_norm": Replicated(),
        "feed_forward": feed_forward_input,
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(),
    }
    for block in model.layers:
        parallelize_module(block, mesh, block_plan, src_data_rank=None)
    root_plan: dict[str, ParallelStyle] = {"embedding": Replicated(), "norm": Replicated()}
    if model.output is not None:
        root_plan["output"] = Replicated()
    parallelize_module(model, mesh, root_plan, src_data_rank=None)
