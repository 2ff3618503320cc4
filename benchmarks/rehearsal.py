"""A run's own training step, taken as one rank of many on a GPU that is not there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.lowering import LoweredGraph

from benchmarks.fake_gpu import FakeGPU, Kernel, Recording
from benchmarks.harness import llama_of, text_of
from benchmarks.interception import one_rank_of
from gns_pretrain.config.schema import Config
from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import (
    Llama,
    TransformerBlock,
    inverse_frequencies,
    parameter_kind,
    rotary_tables,
)
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.step import train_step
from gns_pretrain.workloads.language import build_llama

# Of a bfloat16 logit, in the compiled `logit_gradients_`: read for the maximum and the sum, then
# read and written. Inductor's schedule for CPUs, which `lowered` would take, needs more.
LOGIT_BYTES = 6

_GRAPHS: dict[str, list["LoweredGraph"]] = {}  # compiling takes seconds


class Rehearsal:
    """The steps of a run on one rank; `step` returns what each did."""

    def __init__(
        self,
        config: Config,
        world: World,
        gpu: FakeGPU,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
    ) -> None:
        self.config, self.world, self.gpu = config, world, gpu
        self.model, self.optimizer, self.accumulation = model, optimizer, accumulation

    def step(self, settings: NoiseScaleSettings | None = None) -> Recording:
        """Take one training step, measured by a meter of the given settings or not."""
        config, gpu = self.config, self.gpu
        meter = NoiseMeter(self.model, settings, kinds=parameter_kind) if settings else None
        if meter is not None:
            meter.tap._order_is_known = True  # which only the first measured step learns
        shape = (config.micro_batch_size, text_of(config).sequence_length + 1)
        with gpu.holding("tokens"):
            batches = [
                torch.empty(shape, dtype=torch.int64, device=self.world.device)
                for _ in range(self.accumulation)
            ]
        gpu.start_recording()
        train_step(
            self.model,
            self.optimizer,
            map(inputs_and_targets, batches),
            accumulation=self.accumulation,
            gradient_clip=config.gradient_clip,
            batch_size=config.micro_batch_size * self.accumulation * self.world.num_data_ranks,
            meter=meter,
        )
        recording = gpu.recording
        gpu.start_recording()  # what comes before the next step is not this one's
        return recording


@contextmanager
def rehearsal(
    config: Config, num_ranks: int, *, accumulation: int = 1, ranks_per_node: int = 8
) -> Iterator[Rehearsal]:
    """Build a run's model and optimizer at full size as rank 0 of `num_ranks` GPUs.

    Args:
        config: with the model's vocabulary size; its batch size and budget do not matter here.
        accumulation: micro-batches of a rank's step.
    """
    sharded = config.parallel.resolved_kind(num_ranks) != "single"
    graphs: list[LoweredGraph] = []
    if config.compile != "never":  # before the GPU is there, for inductor reads devices too
        graphs = graphs_of_block(
            llama_of(config),
            config.micro_batch_size,
            text_of(config).sequence_length,
            torch.bfloat16 if sharded else torch.float32,
        )
    with one_rank_of(num_ranks, config.parallel, ranks_per_node=ranks_per_node) as (world, gpu):

        def compile_blocks(model: Llama) -> None:
            for block in model.layers:
                block.forward = partial(run_block, gpu, graphs, block)
            model._logit_gradients = partial(run_logit_gradients, gpu)

        with ExitStack() as stack:
            stack.enter_context(patch.object(Llama, "compile_blocks", compile_blocks))
            stack.enter_context(patch.object(Llama, "init_weights"))
            stack.enter_context(gpu.holding("weights"))
            model = build_llama(config, llama_of(config), world)
        optimizer = config.averaging.build(config.optimizer, model)
        run = Rehearsal(config, world, gpu, model, optimizer, accumulation)
        run.step()  # makes the optimizer's state and the rotary tables
        yield run


def graphs_of_block(
    config: LlamaConfig, sequences: int, length: int, weights: torch.dtype
) -> list["LoweredGraph"]:
    """Return what a block's forward and backward pass compile to, with bfloat16 activations.

    Args:
        weights: FSDP2 casts them before a block sees them.
    """
    from benchmarks.lowering import lowered  # inductor takes seconds to import

    key = f"{config}, {sequences} x {length}, {weights}"
    if key not in _GRAPHS:

        def inputs() -> list[Tensor]:
            x = torch.empty(sequences, length, config.dim, dtype=torch.bfloat16, requires_grad=True)
            return [x, *rotary_tables(inverse_frequencies(config), length, x.device)]

        def block() -> nn.Module:
            before = torch.get_default_dtype()
            torch.set_default_dtype(weights)
            try:
                return TransformerBlock(config)
            finally:
                torch.set_default_dtype(before)

        _GRAPHS[key] = lowered(block, inputs)
    return _GRAPHS[key]


def run_block(
    gpu: FakeGPU,
    graphs: list["LoweredGraph"],
    block: nn.Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: None = None,
) -> Tensor:
    """Stand for a compiled block's forward, without a mask of documents."""
    output: Tensor = _CompiledBlock.apply(gpu, graphs, x, cos, sin, *block.parameters())
    return output


class _CompiledBlock(torch.autograd.Function):
    """Takes and holds the memory of a block's two compiled graphs."""

    @staticmethod
    def forward(
        ctx: Any, gpu: FakeGPU, graphs: list["LoweredGraph"], x: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Return the block's output; the graph's other outputs are saved."""
        ctx.gpu, ctx.graph = gpu, graphs[1]
        gpu.reach(graphs[0].transient, "activations")
        with gpu.holding("activations"):
            output, *saved = [
                torch.empty(shape, dtype=dtype, device=x.device)
                for shape, dtype in graphs[0].outputs
            ]
        run_kernels(gpu, graphs[0], "forward", reads=[x, *inputs], writes=[output, *saved])
        ctx.num_inputs = 1 + len(inputs)
        ctx.save_for_backward(x, *inputs, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Return gradients of x and of the weights."""
        gpu, graph = ctx.gpu, ctx.graph
        x, _, _, *weights = ctx.saved_tensors[: ctx.num_inputs]
        gpu.reach(graph.transient, "activations")
        with gpu.holding("gradients"):
            gradients = [torch.empty_like(tensor) for tensor in (x, *weights)]
        reads = [*grad_outputs, *ctx.saved_tensors]
        run_kernels(gpu, graph, "backward", reads=reads, writes=gradients)
        return None, None, gradients[0], None, None, *gradients[1:]


def run_kernels(
    gpu: FakeGPU, graph: "LoweredGraph", part: str, *, reads: list[Tensor], writes: list[Tensor]
) -> None:
    for kernel in graph.kernels:
        name = f"{part}: {kernel.kind}"
        unit = "attention" if kernel.kind == "attention" else "bfloat16"
        gpu.recording.kernels.append(Kernel(name, name, kernel.bytes, kernel.flops, unit))
    gpu.access(gpu.stream, reads, writes, f"a block's {part}")


def run_logit_gradients(gpu: FakeGPU, logits: Tensor, targets: Tensor) -> Tensor:
    """Stand for the loss's compiled `logit_gradients_`."""
    with gpu.holding("logits"):
        result = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    moved = LOGIT_BYTES * logits.numel()
    gpu.recording.kernels.append(Kernel("loss: element-wise", "logit_gradients_", moved))
    gpu.access(gpu.stream, [targets], [logits, result], "the gradient of the logits")
    return result
