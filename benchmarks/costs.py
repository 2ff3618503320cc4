"""Seconds of what a FakeGPU has recorded, at the rates of a card.

    a kernel    the longer of its FLOPs and its bytes
    a step      the longest of its kernels, of what the host takes to launch them, and of what the
                interconnect takes for its collectives, which run beside the kernels

Rings over several nodes use all cards of a node; what goes to one rank each, as an all-to-all does,
or among one rank of each node, uses its own card.
"""

from dataclasses import dataclass
from typing import Annotated

from benchmarks.fake_gpu import Collective, Kernel, Recording
from benchmarks.harness import Command
from gns_pretrain.fields import About, positive

GPUS_PER_NODE = 8

# Rates that depend on the width of the model's matrices and heads, in TFLOP/s; on an H100 SXM, each
# a line of docs/gpu/2026-11-26_h100.jsonl. By width: float64 products, attention (forward and
# backward together), float64 factorizations (`eigh`, Cholesky).
OF_WIDTH = {768: (45.8, 240.0, 0.48), 1792: (60.8, 342.0, 2.1)}

Rate = Annotated[float, positive()]


@dataclass
class Rates(Command):
    """Rates that a GPU is assumed to reach; those of an H100 SXM, measured where there was one."""

    bfloat16_teraflops: Annotated[Rate, About("of large bfloat16 matmuls")] = 692.0
    float32_teraflops: Annotated[Rate, About("of float32 matmuls")] = 50.0
    float64_teraflops: Annotated[
        float | None, positive(), About("of float64 matmuls; default: measured for such a width")
    ] = None
    attention_teraflops: Annotated[
        float | None, positive(), About("of causal attention; default: measured for such a width")
    ] = None
    memory_terabytes: Annotated[Rate, About("a second, read and written")] = 2.97
    launch_microseconds: Annotated[
        Rate, About("of the host for an operator; assumed, not measured")
    ] = 12.0
    nvlink_gigabytes: Annotated[Rate, About("a second and GPU, one direction; assumed")] = 360.0
    network_gigabytes: Annotated[Rate, About("a second and GPU; a 400 Gb/s card, assumed")] = 40.0
    gpu_gibibytes: Annotated[Rate, About("memory of a GPU")] = 79.0


class Costs:
    """Seconds of what was recorded, on GPUs of some rates.

    Args:
        width: of the model, by which the rates of `OF_WIDTH` are chosen.
    """

    def __init__(self, rates: Rates, width: int) -> None:
        self.rates = rates
        nearest = min(OF_WIDTH, key=lambda known: abs(known - width))
        float64, attention, factorization = OF_WIDTH[nearest]
        self.teraflops = {
            "bfloat16": rates.bfloat16_teraflops,
            "float32": rates.float32_teraflops,
            "float64": rates.float64_teraflops or float64,
            "attention": rates.attention_teraflops or attention,
            "factorization": factorization,
        }

    def kernel(self, kernel: Kernel) -> float:
        computing = kernel.flops / (1e12 * self.teraflops[kernel.unit]) if kernel.flops else 0.0
        return max(computing, kernel.bytes / (1e12 * self.rates.memory_terabytes))

    def collective(self, collective: Collective) -> float:
        rates = self.rates
        ranks, per_node = len(collective.ranks), GPUS_PER_NODE
        nodes = len({rank // per_node for rank in collective.ranks})
        if nodes == 1:
            return collective.sent / (1e9 * rates.nvlink_gigabytes)
        here = ranks / nodes  # of the group, on this node
        if collective.kind == "all-to-all":
            leaving = (ranks - here) / (ranks - 1)
            return collective.sent * leaving / (1e9 * rates.network_gigabytes)
        ring = min(rates.nvlink_gigabytes, here * rates.network_gigabytes)
        return collective.sent / (1e9 * ring)

    def device(self, recording: Recording) -> float:
        return sum(map(self.kernel, recording.kernels))

    def interconnect(self, recording: Recording) -> float:
        return sum(map(self.collective, recording.collectives))

    def host(self, recording: Recording) -> float:
        launches = sum(kernel.launches for kernel in recording.kernels)
        return 1e-6 * self.rates.launch_microseconds * launches

    def step(self, recording: Recording) -> float:
        return max(self.device(recording), self.host(recording), self.interconnect(recording))
