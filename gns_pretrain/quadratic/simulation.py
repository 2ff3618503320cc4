"""Many seeds of a run on a noisy quadratic side by side, with the library's own parts.

A run is a row: a parameter of one optimizer, a weight of one `SampleSums`, whose totals come weight
by weight, and an `AdaptiveBatchSize`. What is measured, decided and updated is so what a training
loop with a `NoiseMeter` has; only the backward passes are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gns_pretrain.batch_size import AdaptiveBatchSize, PolicySettings
from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import smaller_side_gram
from gns_pretrain.noise_scale import Measurement, NoiseScaleSettings, Reading
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.sample_sums import NESTED_STRIDES, SampleSums
from gns_pretrain.optim import SGD
from gns_pretrain.quadratic.problem import NoisyQuadratic

NUM_SAMPLES = 8  # micro-batches of a measured step; a batch that changes is a multiple of it

# Learning rate over its peak, after so many samples; it does not rise, a warm-up is left out.
Factor = Callable[[int], float]


class Runs(NamedTuple):
    """What became of each row."""

    losses: Tensor  # without noise, after the last step; [rows], float64
    batch_sizes: list[list[int]]  # of each step


def controller(
    policy: PolicySettings, batch_size: int, total_samples: int, factor: Factor
) -> AdaptiveBatchSize:
    """Return what chooses the batch size of one run; a sample counts as one token."""
    return AdaptiveBatchSize(
        policy,
        batch_size=batch_size,
        micro_batch_size=batch_size // NUM_SAMPLES,
        micro_batch_max=total_samples,
        min_samples=NUM_SAMPLES,
        total_samples=total_samples,
        tokens_per_sample=1,
        lr_decay=factor,
    )


def plan(
    policy: PolicySettings, batch_size: int, total_samples: int, factor: Factor
) -> Iterator[tuple[float, float]]:
    """Yield learning rate over peak and batch size of each step of a policy that measures nothing.

    The arguments are those of `simulate`.
    """
    adaptive = controller(policy, batch_size, total_samples, factor)
    while adaptive.samples < total_samples:
        yield factor(adaptive.samples) * adaptive.lr_multiplier, adaptive.batch_size
        adaptive.step()


def simulate(
    problem: NoisyQuadratic,
    policy: PolicySettings,
    batch_size: int,
    total_samples: int,
    factor: Factor,
    *,
    lrs: list[float],
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    shape: tuple[int, int] | None = None,
    measure_every: int = 1,
    overhead: float = 0.0,
    seed: int = 0,
) -> Runs:
    """Train one row for each learning rate until it has taken its samples.

    Args:
        batch_size: at first; a multiple of `NUM_SAMPLES`.
        factor: schedule of the learning rate.
        lrs: peak learning rate of each row; one that is repeated has several seeds.
        optimizer: made of parameter groups, such as `Muon` or `partial(Signum, momentum=0.9)`.
        shape: of theta as one matrix; None: a vector.
        measure_every: steps from one measurement to the next; step 1 is measured too.
        overhead: fixed seconds of a step, where a sample takes one.

    Raises:
        InputError: the policy reads a noise scale of matrices, and there is no shape; or one that
            reads the optimizer.
    """
    if shape is None and policy.reads and policy.reads[0] == "nuclear":
        raise InputError(
            "geometry=nuclear measures matrices, and theta is a vector; give simulate a shape, or "
            "use euclidean or manhattan"
        )
    if policy.reads and GEOMETRIES[policy.reads[0]].reads_optimizer:
        raise InputError(
            f"geometry={policy.reads[0]} reads an optimizer, which has no state here; use "
            "euclidean or manhattan, or nuclear with a shape"
        )
    draw = torch.Generator().manual_seed(seed)
    size = (len(lrs), len(problem.curvature))
    curvature, deviation = problem.curvature.float(), problem.variance.sqrt().float()
    theta = torch.randn(size, generator=draw) * problem.start.sqrt().float()
    gradients = torch.empty_like(theta)
    parameters = [nn.Parameter(row.view(shape or row.shape)) for row in theta]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    rule = optimizer([{"params": [parameter]} for parameter in parameters], lr=1.0)
    adaptives = [controller(policy, batch_size, total_samples, factor) for _ in lrs]
    sizes: list[list[int]] = [[] for _ in lrs]
    running, step = list(range(len(lrs))), 0
    while running:
        step += 1
        for row in running:
            adaptive = adaptives[row]
            sizes[row].append(adaptive.batch_size)
            lr = lrs[row] * factor(adaptive.samples) * adaptive.lr_multiplier
            rule.param_groups[row]["lr"] = lr
        now = torch.tensor([of_row[-1] for of_row in sizes])
        spread = deviation / now.sqrt()[:, None]
        readings: list[list[Reading]] = [[] for _ in lrs]
        if policy.reads and (step == 1 or step % measure_every == 0):
            noise = torch.randn(NUM_SAMPLES, *size, generator=draw) * spread * NUM_SAMPLES**0.5
            samples = curvature * theta + noise
            readings = read(samples.view(NUM_SAMPLES, -1, *parameters[0].shape), now, *policy.reads)
            torch.mean(samples, 0, out=gradients)
        else:
            noise = torch.randn(size, generator=draw) * spread
            torch.add(curvature * theta, noise, out=gradients)
        rule.step()
        for row in running:
            adaptives[row].step(readings[row], seconds=overhead + sizes[row][-1])
            if adaptives[row].samples >= total_samples:
                parameters[row].grad = None  # the optimizer leaves it as it is
        running = [row for row in running if parameters[row].grad is not None]
    return Runs(problem.loss(theta.double().square()), sizes)


def read(
    samples: Tensor, batch_sizes: Tensor, geometry_name: str, estimate: str
) -> list[list[Reading]]:
    """Measure every row as a `NoiseMeter` reads a step.

    Args:
        samples: mean gradient of each micro-batch, [samples, rows, ...].
        batch_sizes: [rows].
    """
    geometry = GEOMETRIES[geometry_name](NoiseScaleSettings())
    signed = samples[::2].sum(0) - samples[1::2].sum(0)
    # Each is a sum and, for matrices, an eigendecomposition, which no other estimate takes.
    strides = NESTED_STRIDES if estimate == "nested" else ()
    matrices: dict[str, Any] = {"grams": {}, "matrices": {}, "signed_matrices": {}}
    if geometry.needs.matrices:
        nested = [dict(enumerate(samples[::stride].sum(0))) for stride in strides]
        grams = smaller_side_gram(samples.double()).sum(0)
        of_rows = zip(matrices, (grams, samples.mean(0), signed), strict=True)
        matrices = {name: dict(enumerate(rows)) for name, rows in of_rows}
        matrices["nested_matrices"] = nested
    sums = SampleSums(
        num_even=len(samples[::2]),
        num_odd=len(samples[1::2]),
        square_norms=samples.flatten(2).double().square().sum((0, 2)),
        means=list(samples.mean(0)),
        squares=list(samples.square().sum(0)),
        signed=list(signed),
        nested=[list(samples[::stride].sum(0)) for stride in strides],
        **matrices,
    )
    totals = geometry.totals(sums, 1)  # of a batch of 1: N is in proportion to it
    for total in geometry.spectral_totals(sums, 1):
        totals[total.weight, total.column] = total.function(*total.matrices)
    readings = []
    for row, size in zip(totals.tolist(), batch_sizes.tolist(), strict=True):
        found: Measurement = geometry.measure(estimate, row, batch_size=1, num_samples=len(samples))
        readings.append(
            [Reading(replace(found, noise=found.noise * size, batch_size=size), {}, 0.0)]
        )
    return readings
