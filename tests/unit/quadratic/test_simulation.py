"""Rows of a simulation against a training loop with the public interfaces."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from gns_pretrain import AdaptiveBatchSize, Muon, NoiseMeter, PolicySettings, Signum
from gns_pretrain.optim import SGD
from gns_pretrain.quadratic import QuadraticModel, QuadraticSettings, simulate
from gns_pretrain.quadratic.simulation import NUM_SAMPLES

PROBLEM = QuadraticSettings(dimension=12, noise_level=4).build()
SAMPLES, EVERY = 4096, 3


def factor(samples: int) -> float:
    return 1.0 - 0.9 * samples / SAMPLES


@pytest.mark.parametrize(
    ("policy", "optimizer", "shape", "lrs"),
    [
        (
            PolicySettings("adaptive", geometry="euclidean", estimate="debiased", theta=0.9),
            partial(SGD, momentum=0.5),
            None,
            [0.1, 0.3],
        ),
        (
            PolicySettings("adaptive", geometry="manhattan", estimate="cross_fitted", theta=2.0),
            partial(Signum, momentum=0.8),
            None,
            [0.01, 0.04],
        ),
        (
            PolicySettings("adaptive", geometry="nuclear", theta=0.5),
            partial(Muon, momentum=0.8),
            (3, 4),
            [0.01, 0.04],
        ),
        (PolicySettings("norm_test", theta=1.0), torch.optim.AdamW, None, [0.01, 0.04]),
    ],
    ids=["sgd", "signum", "muon", "adamw"],
)
def test_a_row_is_a_run_of_the_library(
    policy: PolicySettings,
    optimizer: Callable[..., torch.optim.Optimizer],
    shape: tuple[int, int] | None,
    lrs: list[float],
) -> None:
    runs = simulate(
        PROBLEM,
        policy,
        16,
        SAMPLES,
        factor,
        lrs=lrs,
        optimizer=optimizer,
        shape=shape,
        measure_every=EVERY,
    )
    for row, lr in enumerate(lrs):
        assert policy.reads
        geometry, estimate = policy.reads
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(len(lrs), 12, generator=draw)[row]
        model = QuadraticModel(PROBLEM, start.view(shape or (12,)))
        rule = optimizer(model.parameters(), lr=lr)
        meter = NoiseMeter(model, geometries=[geometry], estimates=[estimate], every_steps=EVERY)
        adaptive = AdaptiveBatchSize(
            policy,
            batch_size=16,
            micro_batch_size=2,
            micro_batch_max=SAMPLES,
            total_samples=SAMPLES,
        )
        sizes = []
        while adaptive.samples < SAMPLES:
            step, size = adaptive.steps + 1, adaptive.batch_size
            measured = step == 1 or step % EVERY == 0
            count = NUM_SAMPLES if measured else 1
            noise = torch.randn(count, len(lrs), 12, generator=draw)[:, row]
            noise *= (PROBLEM.variance.float() * count / size).sqrt()
            with meter.step(step):
                for sequences in noise:  # a micro-batch, as the mean of its sequences
                    with meter.sample():
                        (model(sequences[None]) / count).backward()
            readings = meter.read(batch_size=size)
            rule.param_groups[0]["lr"] = lr * factor(adaptive.samples) * adaptive.lr_multiplier
            rule.step()
            rule.zero_grad()
            adaptive.step(readings)
            sizes.append(size)
        assert runs.batch_sizes[row] == sizes
        loss = PROBLEM.loss(model.weight.detach().double().flatten().square()).item()
        assert runs.losses[row].item() == pytest.approx(loss, rel=1e-3)
    assert runs.batch_sizes[0] != runs.batch_sizes[1]
    assert all(sizes[-1] > 16 for sizes in runs.batch_sizes)


def test_goodput_takes_larger_batches_the_more_a_step_costs_besides_its_sequences() -> None:
    policy = PolicySettings(
        "goodput", geometry="euclidean", estimate="cross_fitted", warmup_fraction=0.0
    )
    steps = []
    for overhead in (0.0, 64.0):
        runs = simulate(
            QuadraticSettings(dimension=20).build(),
            policy,
            16,
            4096,
            lambda samples: 1 - samples / 4096,
            lrs=[0.7] * 4,
            measure_every=10,
            overhead=overhead,
        )
        steps.append(sum(map(len, runs.batch_sizes)))
        assert max(map(max, runs.batch_sizes)) > 16
    assert steps[1] < 0.8 * steps[0]
