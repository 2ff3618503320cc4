"""Noise and signal from every sample's own gradient, whole and in float64: the reference.

The equations of arXiv:2602.03001, Section 4.1, as they stand and on singular values. Nothing here
calls the package, so that it does not check itself.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# By geometry and estimate noise and signal; of `nested` what steps of parts of the samples gain.
Values = dict[tuple[str, str], tuple[float, ...]]
Batch = Mapping[str, Tensor]


def sample_gradients(
    model: nn.Module, samples: list[Batch], loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Every sample's own gradient of every trainable weight by torch.func, [R, ...].

    Args:
        model: in float64; batch norm by the statistics of a batch.
        loss: of the model's output.
    """
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss_of(weights: dict[str, Tensor], sample: Batch) -> Tensor:
        return loss(functional_call(model, weights, kwargs=dict(sample)))

    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    with sdpa_kernel(SDPBackend.MATH):  # what vmap can batch
        return vmap(grad(loss_of), in_dims=(None, 0))(weights, stacked)


def looped_sample_gradients(
    model: nn.Module, samples: list[Batch], loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The same by one autograd.grad a sample, for what vmap cannot take: autocast, say."""
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss(model(**sample)), list(weights.values()), materialize_grads=True)
        for sample in samples
    ]
    return {n: torch.stack(of) for n, of in zip(weights, zip(*rows, strict=True), strict=True)}


def noise_and_signal(
    gradients: Mapping[str, Tensor], matrices: Collection[str], batch_size: int
) -> Values:
    """What every geometry and estimate measures.

    Args:
        gradients: [R, ...] by weight; one row a sample.
        matrices: names of the weights that the nuclear geometry takes, as [shape[0], rest].
        batch_size: B, of all samples together.
    """
    gradients = {name: g.double() for name, g in gradients.items()}
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    count = len(flat)
    unbiased = batch_size / (count - 1)
    mean, deviations = flat.mean(0), flat - flat.mean(0)
    variance = unbiased * deviations.square().mean(0)
    first, second = flat[0::2].mean(0), flat[1::2].mean(0)
    euclidean_gain = (first @ second) * (1 / first.norm() + 1 / second.norm()) / 2
    manhattan_gain = (first @ second.sign() + second @ first.sign()) / 2
    nested = [parted(flat, stride) for stride in (8, 4)]
    euclidean_parts = [rest @ part / part.norm() for part, rest in nested]
    manhattan_parts = [rest @ part.sign() for part, rest in nested]
    tr_c, norm_1 = variance.sum(), variance.sqrt().sum() ** 2
    c4 = math.sqrt(2 / (count - 1)) * math.gamma(count / 2) / math.gamma((count - 1) / 2)

    roots = norms = nuclear_gain = torch.zeros((), dtype=torch.float64)
    nuclear_parts = torch.zeros(2, dtype=torch.float64)
    for name in matrices:
        stack = gradients[name].flatten(2)  # [R, m, n]
        spread = stack - stack.mean(0)
        wide = spread if stack.shape[1] <= stack.shape[2] else spread.mT
        # tr C^(1/2) is the sum of the singular values of all deviations side by side.
        beside = torch.cat(list(wide), dim=1) * math.sqrt(unbiased / count)
        roots = roots + torch.linalg.svdvals(beside).sum()
        norms = norms + torch.linalg.svdvals(stack.mean(0)).sum()
        a, b = stack[0::2].mean(0), stack[1::2].mean(0)
        nuclear_gain = nuclear_gain + ((a * polar(b)).sum() + (b * polar(a)).sum()) / 2
        pairs = [parted(stack, stride) for stride in (8, 4)]
        nuclear_parts += torch.stack([(rest * polar(part)).sum() for part, rest in pairs])

    values: dict[tuple[str, str], tuple[Any, ...]] = {
        ("euclidean", "plug_in"): (tr_c, mean @ mean),
        ("euclidean", "debiased"): (tr_c, mean @ mean - tr_c / batch_size),
        ("euclidean", "cross_fitted"): (tr_c, euclidean_gain * euclidean_gain.abs()),
        ("manhattan", "plug_in"): (norm_1, mean.abs().sum() ** 2),
        ("manhattan", "debiased"): (norm_1 / c4**2, mean.abs().sum() ** 2),
        ("manhattan", "cross_fitted"): (norm_1, manhattan_gain * manhattan_gain.abs()),
        ("nuclear", "plug_in"): (roots**2, norms**2),
        ("nuclear", "cross_fitted"): (roots**2, nuclear_gain * nuclear_gain.abs()),
        ("euclidean", "nested"): (*euclidean_parts, euclidean_gain),
        ("manhattan", "nested"): (*manhattan_parts, manhattan_gain),
        ("nuclear", "nested"): (*nuclear_parts, nuclear_gain),
    }
    return {key: tuple(map(float, numbers)) for key, numbers in values.items()}


def adams_noise_and_signal(
    gradients: Mapping[str, Tensor], scales: Mapping[str, Tensor], batch_size: int
) -> Values:
    """What the adam geometry measures: the Euclidean scale of gradients over their scales.

    Args:
        scales: v^(1/2) + epsilon, by the weights that Adam trains.
    """
    scaled = {name: gradients[name].double() / scale for name, scale in scales.items()}
    found = noise_and_signal(scaled, (), batch_size)
    return {("adam", key[1]): values for key, values in found.items() if key[0] == "euclidean"}


def composite_noise_and_signal(
    gradients: Mapping[str, Tensor],
    lengths: Mapping[str, float],
    scales: Mapping[str, Tensor],
    batch_size: int,
    *,
    matrices: Collection[str],
    squares: bool = False,
) -> Values:
    """What the composite geometry measures.

    Args:
        lengths: of each weight's step.
        scales: of the rest, where it is Adam's; empty: the rest is in the Manhattan geometry.
        matrices: names of those that are in the nuclear geometry.
        squares: whether parts add up as squares.
    """
    of_matrices, of_rest = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]  # roots of N and M, and s
    for name, gradient in gradients.items():
        length, gradient = lengths[name], gradient.double()
        found = noise_and_signal({name: gradient}, [name] * (name in matrices), batch_size)
        if name in matrices:
            add(of_matrices, length, *roots(found, "nuclear"))
        elif scales:
            mean, first, second = (x.mean(0) for x in (gradient, gradient[::2], gradient[1::2]))
            gained = [(a * b / scales[name]).sum() for a, b in ((mean, mean), (first, second))]
            add(of_rest, length, 0.0, *map(float, gained))
        else:
            add(of_rest, length, *roots(found, "manhattan"))
    if scales:
        noise, signal = adams_noise_and_signal(gradients, scales, batch_size)["adam", "plug_in"]
        of_rest[0] = of_rest[1] * math.sqrt(noise / signal)
    if squares:
        noise, signal, gain = (
            a * abs(a) + b * abs(b) for a, b in zip(of_matrices, of_rest, strict=True)
        )
    else:
        noise, signal, gain = (
            (a + b) * abs(a + b) for a, b in zip(of_matrices, of_rest, strict=True)
        )
    return {("composite", "plug_in"): (noise, signal), ("composite", "cross_fitted"): (noise, gain)}


def roots(found: Values, geometry: str) -> list[float]:
    """Roots of N and M, and s with its sign."""
    numbers = [*found[geometry, "plug_in"], found[geometry, "cross_fitted"][1]]
    return [math.copysign(math.sqrt(abs(number)), number) for number in numbers]


def add(to: list[float], factor: float, *numbers: float) -> None:
    to[:] = [a + factor * b for a, b in zip(to, numbers, strict=True)]


def parted(samples: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean of every stride-th sample, and of all others."""
    is_part = torch.arange(len(samples)) % stride == 0
    return samples[is_part].mean(0), samples[~is_part].mean(0)


def polar(matrix: Tensor) -> Tensor:
    """The matrix sign; singular values below 1e-5 of the largest are rounding and have none."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-5 * values[0]
    return u[:, kept] @ v[kept]
