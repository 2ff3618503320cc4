"""Fixed schedules from the literature, against expected losses: seesaw and late switching."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from gns_pretrain.batch_size import PolicySettings
from gns_pretrain.quadratic import NoisyQuadratic, QuadraticSettings
from gns_pretrain.quadratic.expected import SGD, moments_after, steady_state
from gns_pretrain.quadratic.simulation import plan

BATCH, SAMPLES = 64, 64 * 512
CONSTANT, SEESAW = PolicySettings(), PolicySettings("seesaw")
# Leaves the rate at its peak while the batch grows, as plain SGD would have it.
LINEAR_SEESAW = PolicySettings("seesaw", lr_scaling="linear")


def falling(samples: int) -> float:
    return 1 - min(samples / SAMPLES, 1.0)


def plain(problem: NoisyQuadratic, steps: Iterable[tuple[float, float]], lr: float) -> float:
    found = moments_after(steps, problem, SGD, torch.tensor([lr], dtype=torch.float64))
    return problem.loss(found.theta).item()


def normalized(problem: NoisyQuadratic, steps: Iterable[tuple[float, float]], lr: float) -> float:
    """SGD whose steps are divided by (E||g||^2)^(1/2) (arXiv:2510.14717): `lr` without a signal."""
    lr *= (problem.variance.sum() / BATCH).sqrt().item()
    for step in steps:
        squares = problem.curvature.square() * problem.start + problem.variance / step[1]
        rate = torch.tensor([lr], dtype=torch.float64) / squares.sum().sqrt()
        problem = replace(problem, start=moments_after([step], problem, SGD, rate).theta[0])
    return problem.loss(problem.start).item()


def excess(train, policy: PolicySettings, noise_level: float, lr: float) -> float:
    """Risk of a policy over that of a constant batch with the same schedule, minus 1."""
    problem = QuadraticSettings(dimension=64, noise_level=noise_level).build()
    risks, steps = [], []
    for each in (policy, CONSTANT):
        of_steps = list(plan(each, BATCH, SAMPLES, falling))
        steps.append(len(of_steps))
        risks.append(train(problem, of_steps, lr))
    assert steps[0] < 0.55 * steps[1]
    return risks[0] / risks[1] - 1


@pytest.mark.parametrize(
    ("train", "policy", "noise_level"),
    [
        (normalized, SEESAW, 1e3),  # where noise rules, as that paper assumes
        (plain, LINEAR_SEESAW, 1e3),
        (plain, LINEAR_SEESAW, 1e-3),  # plain SGD needs no such assumption
    ],
)
def test_seesaw_has_the_risk_of_its_schedule_at_equal_samples_in_half_the_steps(
    train, policy, noise_level
):
    # Equal to first order in lr h, h <= 1: what is left of it, and of rounding, falls with lr.
    small, large = (abs(excess(train, policy, noise_level, lr)) for lr in (0.02, 0.1))
    assert small < 0.005
    assert small < large < 0.01


def test_seesaw_lags_its_schedule_where_the_gradient_rules_its_norm():
    # A batch then makes no step larger, and half the steps go less far.
    assert 0.09 < excess(normalized, SEESAW, 1.0, 0.02) < 0.11
    assert 0.11 < excess(plain, SEESAW, 1.0, 0.02) < 0.13


@pytest.mark.parametrize("cut", [0.5, 0.25])
def test_a_cut_of_the_rate_and_seesaws_have_one_steady_state(cut):
    # Normalized, where noise rules, a rate is worth lr B^(1/2): cut^(1/2) (1 / cut)^(1/2) = 1 of
    # what it was. So r c / (B (2 - r h)) is the same but for the denominator's r.
    problem = QuadraticSettings(dimension=8).build()
    lr = 0.01
    rates = torch.tensor([cut * lr, lr], dtype=torch.float64)
    cut_rate, seesaw = steady_state(problem, SGD, rates, torch.tensor([BATCH, BATCH / cut]))
    h = problem.curvature
    torch.testing.assert_close(seesaw, cut_rate * (2 - cut * lr * h) / (2 - lr * h))
    # As many samples, and as far: (1 - lr h)^(cut n) against (1 - cut lr h)^n.
    assert (1 - lr) ** (cut * 1000) == pytest.approx((1 - cut * lr) ** 1000, rel=0.04)


def late(share: float) -> PolicySettings:
    """Eight times the batch after a share of the samples, at the same rate (arXiv:2602.14208)."""
    return PolicySettings(
        "staged", stage_tokens=[int(share * SAMPLES)], stage_sizes=[8 * BATCH], lr_scaling="none"
    )


def best_loss(problem: NoisyQuadratic, policy: PolicySettings, batch_size: int = BATCH) -> float:
    lrs = SGD.largest_lr(problem) * 2 ** torch.linspace(-7, -0.01, 29, dtype=torch.float64)
    steps = plan(policy, batch_size, SAMPLES, lambda samples: 1.0)
    return problem.loss(moments_after(steps, problem, SGD, lrs).theta).min().item()


def test_a_batch_that_switches_late_beats_constant_ones_and_the_later_the_harder_the_problem():
    # Harder: the curvature falls faster, so that more of the loss is learned slowly.
    shares = (0.2, 0.5, 0.8, 0.95)
    best = {}
    for exponent in (1.0, 1.5):
        problem = QuadraticSettings(dimension=64, exponent=exponent).build()
        losses = {share: best_loss(problem, late(share)) for share in shares}
        constant = min(best_loss(problem, CONSTANT, size) for size in (BATCH, 8 * BATCH))
        best[exponent] = min(losses, key=losses.__getitem__)
        assert losses[best[exponent]] < 0.75 * constant
        assert losses[0.8] < losses[0.2]
    assert best[1.0] < best[1.5]
