"""Expected losses against dense matrices, against sampling, and by hand."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from gns_pretrain import optim
from gns_pretrain.batch_size import PolicySettings
from gns_pretrain.quadratic import NoisyQuadratic, QuadraticSettings, simulate
from gns_pretrain.quadratic.expected import (
    SGD,
    Descent,
    best_schedules,
    fewest_steps,
    moments_after,
    steady_state,
    steps_to,
)

RULES = [SGD, Descent(momentum=0.8), Descent(power=0.5), Descent(momentum=0.6, power=0.7)]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_moments_equal_those_of_a_dense_matrix(rule: Descent) -> None:
    draw = torch.Generator().manual_seed(0)
    problem = NoisyQuadratic(numbers(1.0, 0.5, 0.1), numbers(0.3, 2.0, 0.7), numbers(1.0, 2.0, 0.5))
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=draw))[0]
    hessian, noise, start, conditioner = (
        basis @ torch.diag(values) @ basis.T
        for values in (
            problem.curvature,
            problem.variance,
            problem.start,
            problem.curvature**-rule.power,
        )
    )
    plan = [(1.0, 4.0), (0.5, 8.0), (0.7, 2.0)]
    covariance = torch.zeros(6, 6, dtype=torch.float64)  # of theta and m
    covariance[:3, :3] = start
    for factor, batch_size in plan:
        rate, one = 0.3 * factor * conditioner, torch.eye(3, dtype=torch.float64)
        momentum = rule.momentum * one
        step = torch.cat(
            [
                torch.cat([one - rate @ hessian, -rate @ momentum], 1),
                torch.cat([hessian, momentum], 1),
            ]
        )
        inflow = torch.cat([-rate, one])
        covariance = step @ covariance @ step.T + inflow @ noise @ inflow.T / batch_size
    found = problem.loss(moments_after(plan, problem, rule, numbers(0.3)).theta)
    torch.testing.assert_close(found[0], torch.trace(hessian @ covariance[:3, :3]) / 2)


def test_expected_loss_is_the_mean_of_simulated_runs() -> None:
    problem = QuadraticSettings(dimension=8, noise_level=20).build()
    runs = simulate(
        problem,
        PolicySettings(),
        8,
        8 * 30,
        lambda samples: 1.0 - samples / 480,
        lrs=[0.1] * 400,
        optimizer=partial(optim.SGD, momentum=0.5),
    )
    plan = [(1.0 - 8 * step / 480, 8.0) for step in range(30)]
    expected = problem.loss(moments_after(plan, problem, Descent(momentum=0.5), numbers(0.1)).theta)
    error = runs.losses.std() / len(runs.losses) ** 0.5
    assert abs(runs.losses.mean() - expected[0]) < 4 * error
    assert error < 0.05 * expected[0]


def test_steady_state_by_hand() -> None:
    # r c / B / (h (2 - r h)) = 0.5 * 2 / 4 / (2 * (2 - 1)) for h = 2, c = 2, B = 4.
    problem = NoisyQuadratic(numbers(2.0), numbers(2.0), numbers(1.0))
    assert steady_state(problem, SGD, numbers(0.5), numbers(4.0)).item() == pytest.approx(0.125)


@pytest.mark.parametrize("rule", RULES)
def test_many_steps_lead_to_the_steady_state(rule: Descent) -> None:
    problem = QuadraticSettings(dimension=4).build()
    found = moments_after([(1.0, 2.0)] * 2000, problem, rule, numbers(0.1)).theta
    torch.testing.assert_close(found, steady_state(problem, rule, numbers(0.1), numbers(2.0)))


@pytest.mark.parametrize("rule", RULES)
def test_steps_to_a_target_are_those_of_the_recursion(rule: Descent) -> None:
    problem = QuadraticSettings(dimension=20, noise_exponent=0.3).build()
    lrs, sizes = numbers(0.02, 0.05, 0.4, 0.4), numbers(2.0, 16.0, math.inf, 0.1)
    steps, squares = steps_to(0.3, problem, rule, lrs, sizes)
    assert steps[-1] == math.inf  # the steady state lies above
    for lr, size, count in zip(lrs[:3], sizes[:3].tolist(), steps[:3].tolist(), strict=True):
        losses = [
            problem.loss(moments_after([(1.0, size)] * n, problem, rule, lr).theta).item()
            for n in (int(count) - 1, int(count))
        ]
        assert losses[1] <= 0.3 < losses[0]
    torch.testing.assert_close(problem.loss(squares)[2].item(), losses[1])


def test_batch_size_scales_perfectly_up_to_a_bend_that_the_rule_moves() -> None:
    problem = QuadraticSettings(dimension=100).build()
    sizes = 2.0 ** torch.arange(0, 19, 2).double()
    steps, lrs = zip(
        *(fewest_steps(0.004, problem, rule, sizes) for rule in RULES[:3]), strict=True
    )
    for rule, of_rule, lr in zip(RULES, steps, lrs, strict=False):
        samples = of_rule * sizes
        # Whole steps and a grid of rates; a heavy ball overshoots, and gains some just before.
        slack = 0.1 if rule.momentum else 0.01
        assert (of_rule.diff() <= 0).all()
        assert (samples.diff() >= -slack * samples[:-1]).all()
        torch.testing.assert_close(samples[2], samples[0], rtol=0.01, atol=0)  # linear
        torch.testing.assert_close(lr[2], 16 * lr[0], rtol=0.15, atol=0)
        assert of_rule[-2] <= 1.1 * of_rule[-1]  # flat
    plain, heavy, conditioned = steps
    assert abs(heavy[0] / plain[0] - 1) < 0.01  # momentum gains nothing at a small batch
    assert heavy[-1] < 0.5 * plain[-1]
    assert conditioned[0] < plain[0]
    bends = [(of_rule[0] / of_rule[-1]).item() for of_rule in steps]
    assert min(bends[1:]) > 2 * bends[0]


def test_preconditioning_trades_noise_for_speed_at_one_learning_rate() -> None:
    problem = QuadraticSettings(dimension=50).build()
    lr = numbers(0.2)
    rules = [Descent(power=p) for p in (0.0, 0.25, 0.5, 0.75)]
    floors = torch.cat(
        [problem.loss(steady_state(problem, rule, lr, numbers(8.0))) for rule in rules]
    )
    biases = torch.cat(
        [problem.loss(moments_after([(1.0, math.inf)] * 50, problem, r, lr).theta) for r in rules]
    )
    assert (floors.diff() > 0).all()
    assert (biases.diff() < 0).all()
    halved = problem.loss(steady_state(problem, SGD, lr, numbers(16.0)))
    torch.testing.assert_close(halved, floors[:1] / 2)


def test_the_searched_schedule_is_the_best_one_of_a_constant_learning_rate() -> None:
    # The loss is then bias + sum_k w_k / B_k over stages k, least where B_k ~ w_k^(1/2).
    problem = QuadraticSettings(dimension=30).build()
    samples, steps, stages, lr = 4000.0, 80, 8, 0.3
    found = best_schedules(problem, samples=samples, steps=numbers(steps), lr=lr, stages=stages)
    left = (1 - lr * problem.curvature).square()
    kicks = torch.stack([lr**2 * problem.variance * left ** (steps - 1 - n) for n in range(steps)])
    weights = problem.loss(kicks).view(stages, -1).sum(1)
    sizes = samples / (steps / stages) * weights.sqrt() / weights.sqrt().sum()
    torch.testing.assert_close(found.batch_sizes[0], sizes, rtol=2e-2, atol=0)
    bias = problem.loss(left**steps * problem.start)
    torch.testing.assert_close(found.losses[0], bias + (weights / sizes).sum(), rtol=1e-5, atol=0)


def test_no_schedule_drawn_by_chance_beats_the_searched_one() -> None:
    problem = QuadraticSettings(dimension=30).build()
    samples, steps = 4000.0, 80
    best = best_schedules(problem, samples=samples, steps=numbers(steps, 2 * steps))
    assert best.losses[1] <= best.losses[0]  # the same samples
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        shares = torch.rand(4, generator=draw).double().softmax(0).repeat_interleave(steps // 4)
        rates = (2 * torch.rand(4, generator=draw)).double().sort(descending=True).values
        plan = zip(
            rates.repeat_interleave(steps // 4).tolist(),
            (shares / shares.sum() * samples).tolist(),
            strict=True,
        )
        loss = problem.loss(moments_after(plan, problem, SGD, numbers(1.0)).theta)
        assert best.losses[0] <= loss.item()
