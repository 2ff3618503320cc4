"""Update rules over a model's block matrices, against torch.optim.Muon and a memory-bound floor."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import nn

from benchmarks.harness import (
    ModelCommand,
    ModelName,
    Pairs,
    Row,
    compute_dtype,
    device_name,
    paired,
    this_process,
)
from gns_pretrain.fields import About, at_least
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.combined import split_parameters
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from gns_pretrain.parallel.mesh import World


@dataclass
class Optimizer(ModelCommand):
    """Muon's step against torch.optim.Muon's; sign rules against one pass over their tensors."""

    model: ModelName = "llama3_160m"
    vocab_size: Annotated[int, at_least(1), About("tokens; of what is not updated")] = 2
    layers: Annotated[int | None, at_least(1), About("blocks; default: all")] = None
    pairs: Pairs = 5
    eager: Annotated[bool, About("sign rules without torch.compile")] = False

    def run(self) -> Iterator[Row]:
        """Yield a row for signSGD, Signum and Muon."""
        world = this_process()
        yield self.measure_sign_rule(0.0, world)
        yield self.measure_sign_rule(0.95, world)
        yield self.compare_muon(world)

    def build(
        self, settings: OptimizerSettings, world: World
    ) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """Return a rule as train.py builds it and the block matrices, at zero, with gradients."""
        shape = self.shape()
        with world.device:
            model = Llama(replace(shape, num_layers=self.layers or shape.num_layers))
        groups, _ = split_parameters(model)
        matrices: list[nn.Parameter] = groups[0]["params"]
        generator = torch.Generator(world.device).manual_seed(0)
        for matrix in matrices:
            nn.init.zeros_(matrix)
            matrix.grad = torch.randn(matrix.shape, generator=generator, device=world.device)
        return settings.build(model), matrices

    def compare_muon(self, world: World) -> Row:
        """Time our Muon and torch's alternating, on the same gradients.

        `relative_difference` is between the first updates, relative to their size (torch's is
        rounded to bfloat16).
        """
        settings = MuonSettings(lr=0.02)
        ours, matrices = self.build(settings, world)
        copies = [nn.Parameter(matrix.detach().clone()) for matrix in matrices]
        for copy, matrix in zip(copies, matrices, strict=True):
            copy.grad = matrix.grad
        theirs = torch.optim.Muon(
            copies, lr=0.02, weight_decay=settings.weight_decay, momentum=settings.momentum
        )
        ours.step()
        theirs.step()
        difference = [(a - b).detach() for a, b in zip(matrices, copies, strict=True)]
        norm = torch.nn.utils.get_total_norm
        apart = (norm(difference) / norm([copy.detach() for copy in copies])).item()
        timings = paired({"ours": ours.step, "torch": theirs.step}, self.pairs, world)
        return {
            "measured": "muon",
            **self.described(matrices, world),
            "precision": str(compute_dtype(world.device)).removeprefix("torch."),
            "seconds": round(timings.median("ours"), 5),
            "torch_seconds": round(timings.median("torch"), 5),
            **timings.ratio("times_as_fast", "torch", "ours"),
            "relative_difference": apart,
        }

    def measure_sign_rule(self, momentum: float, world: World) -> Row:
        """Time Signum, or signSGD at momentum 0, against reading and writing its tensors once.

        The floor is torch's own foreach kernels: m += g and w *= c for Signum, which read g, m and
        w and write m and w; w += g for signSGD.
        """
        mode = "never" if self.eager else "always"
        settings = SignumSettings(lr=1e-3, momentum=momentum, compile=mode)
        rule, matrices = self.build(settings, world)
        weights = [matrix.detach() for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [torch.zeros_like(gradient) for gradient in gradients]

        def floor() -> None:
            if momentum:
                torch._foreach_add_(momenta, gradients)
                torch._foreach_mul_(weights, 0.999)
            else:
                torch._foreach_add_(weights, gradients)

        timings = paired({"rule": rule.step, "floor": floor}, self.pairs, world)
        return {
            "measured": "signum" if momentum else "signsgd",
            **self.described(matrices, world),
            "compiled": not self.eager,
            "seconds": round(timings.median("rule"), 6),
            "floor_seconds": round(timings.median("floor"), 6),
            **timings.ratio("times_the_floor", "rule", "floor"),
        }

    def described(self, matrices: list[nn.Parameter], world: World) -> Row:
        """Return what a row was measured on."""
        return {
            "model": self.shape().name,
            "matrices": len(matrices),
            "parameters": sum(matrix.numel() for matrix in matrices),
            "device": device_name(world.device),
            "pairs": self.pairs,
        }
