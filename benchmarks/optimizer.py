"""Speed of the update rules over a model's block weights, in this process.

Muon stands against torch.optim.Muon; the sign rules against reading and writing their tensors once.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.base import block_matrices
from gns_pretrain.optim.signum import Signum
from gns_pretrain.optim.spectral import MuonSettings, Spectral
from gns_pretrain.parallel.matrix_ownership import OwnerCompute

WARM_UP_STEPS = 2


def compare_muon(
    config: LlamaConfig,
    *,
    layers: int | None = None,
    pairs: int = 5,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Time a step of our Muon and one of torch's in turns, on the same gradients.

    Args:
        config: whose block matrices are updated.
        layers: blocks of it, all by default; the time is proportional to them.
        pairs: timed steps of each, at least 2.
        device: default: the GPU if there is one.

    Returns:
        One row: median seconds of both, `ratio` theirs / ours with its quartiles, and how far the
        two first updates lie apart, relative to their size (torch's is rounded to bfloat16).
    """
    device = device or default_device()
    shapes = block_shapes(config, layers)
    gradients = filled(shapes, device, seed=0)
    settings = MuonSettings(lr=0.02)
    weights = [[nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2)]
    for copies in weights:
        for weight, gradient in zip(copies, gradients, strict=True):
            weight.grad = gradient
    theirs = torch.optim.Muon(
        weights[1], lr=0.02, weight_decay=settings.weight_decay, momentum=settings.momentum
    )
    ours = Spectral(weights[0], settings, OwnerCompute(weights[0], None))
    ours.step()
    theirs.step()
    apart = distance(weights[0], weights[1])
    seconds = alternate({"ours": ours.step, "torch": theirs.step}, pairs, device)
    return {
        "measured": "muon",
        **described(config, shapes, device, pairs),
        "precision": str(ours.precision).removeprefix("torch."),
        "seconds": round(statistics.median(seconds["ours"]), 5),
        "torch_seconds": round(statistics.median(seconds["torch"]), 5),
        **quartiles("times_as_fast", seconds["torch"], seconds["ours"]),
        "relative_difference": apart,
    }


def measure_sign_rule(
    config: LlamaConfig,
    *,
    momentum: float,
    compiled: bool,
    layers: int | None = None,
    pairs: int = 20,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Time a step of Signum or signSGD against reading and writing its tensors once.

    The floor is what torch's own foreach kernels take for that: m += g and w *= c for Signum, which
    read g, m and w and write m and w; w += g for signSGD.

    Args:
        config: whose block matrices are updated.
        momentum: of the rule; 0 is signSGD.
        compiled: one compiled kernel, or foreach operations.
        layers: blocks of it, all by default.
        pairs: timed steps of each, at least 2.
        device: default: the GPU if there is one.

    Returns:
        One row: median seconds of both, and `times_the_floor` with its quartiles.
    """
    device = device or default_device()
    shapes = block_shapes(config, layers)
    weights = [nn.Parameter(weight) for weight in filled(shapes, device, seed=0)]
    gradients = filled(shapes, device, seed=1)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    groups = [{"params": weights, "weight_decay": 0.1}]
    rule = Signum(groups, lr=1e-3, momentum=momentum, compile="always" if compiled else "never")
    momenta = [torch.zeros_like(gradient) for gradient in gradients]
    values = [weight.detach() for weight in weights]

    def once() -> None:
        if momentum:
            torch._foreach_add_(momenta, gradients)
            torch._foreach_mul_(values, 0.999)
        else:
            torch._foreach_add_(values, gradients)

    seconds = alternate({"rule": rule.step, "floor": once}, pairs, device)
    return {
        "measured": "signum" if momentum else "signsgd",
        **described(config, shapes, device, pairs),
        "compiled": compiled,
        "seconds": round(statistics.median(seconds["rule"]), 6),
        "floor_seconds": round(statistics.median(seconds["floor"]), 6),
        **quartiles("times_the_floor", seconds["rule"], seconds["floor"]),
    }


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block_shapes(config: LlamaConfig, layers: int | None) -> list[torch.Size]:
    """Shapes of the block matrices, of the first `layers` blocks."""
    with torch.device("meta"):
        model = Llama(replace(config, num_layers=layers or config.num_layers))
    return [weight.shape for weight in block_matrices(model)]


def filled(shapes: list[torch.Size], device: torch.device, *, seed: int) -> list[Tensor]:
    """Normal random tensors, float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def distance(first: list[nn.Parameter], second: list[nn.Parameter]) -> float:
    """||first - second|| / ||second|| over all tensors."""
    difference = [(a - b).detach() for a, b in zip(first, second, strict=True)]
    norm = torch.nn.utils.get_total_norm
    return (norm(difference) / norm([b.detach() for b in second])).item()


def alternate(
    steps: dict[str, Callable[[], Any]], pairs: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, after a warm-up; who goes first changes from pair to pair."""
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(pairs):
        for name in order:
            seconds[name].append(timed(steps[name], device))
        order.reverse()
    return seconds


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one step, to the end of what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def described(
    config: LlamaConfig, shapes: list[torch.Size], device: torch.device, pairs: int
) -> dict[str, Any]:
    """What a row was measured on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "model": config.name,
        "matrices": len(shapes),
        "parameters": sum(shape.numel() for shape in shapes),
        "device": name,
        "pairs": pairs,
    }


def quartiles(name: str, above: list[float], below: list[float]) -> dict[str, Any]:
    """Median and quartiles of the ratio, pair by pair: what slows the machine slows both."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {name: round(middle, 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}
