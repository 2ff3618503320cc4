"""Expected losses of SGD on a noisy quadratic, exactly, and the schedule that makes them least.

    m = beta m + g        theta = theta - lr h^-p m        (arXiv:1907.04164, Section 3)

Coordinates are independent and the rule is linear: second moments of each follow a recursion, and
with one learning rate and batch size a closed form. Shapes: [d] coordinates; [K] or [...] runs side
by side. Batch sizes need not be whole; inf is a gradient without noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gns_pretrain.quadratic.problem import NoisyQuadratic

MOST_DOUBLINGS = 40  # of the steps to a target


@dataclass(frozen=True)
class Descent:
    """SGD with a momentum that sums (heavy ball), and with the preconditioner H^-p."""

    momentum: float = 0.0  # beta
    power: float = 0.0  # p; 0 is none, 1 is Newton's method

    def rates(self, problem: NoisyQuadratic, lr: Tensor) -> Tensor:
        """Learning rate of each coordinate; [...] to [..., d]."""
        return lr[..., None] * problem.curvature**-self.power

    def largest_lr(self, problem: NoisyQuadratic) -> float:
        """From which on some coordinate diverges."""
        return 2 * (1 + self.momentum) / (problem.curvature ** (1 - self.power)).max().item()


SGD = Descent()


class Moments(NamedTuple):
    """Second moments of every coordinate, [..., d] each."""

    theta: Tensor  # E theta^2
    cross: Tensor  # E theta m
    momentum: Tensor  # E m^2


def moments_after(
    plan: Iterable[tuple[float, float]], problem: NoisyQuadratic, rule: Descent, peak_lrs: Tensor
) -> Moments:
    """Return the moments after a plan's steps, for each peak learning rate [...].

    Args:
        plan: of each step, the learning rate relative to its peak, and the batch size.
    """
    h, beta, peaks = problem.curvature, rule.momentum, rule.rates(problem, peak_lrs)
    theta, cross, momentum = problem.start, torch.zeros_like(h), torch.zeros_like(h)
    for factor, batch_size in plan:
        rates = peaks * factor
        gradient = h.square() * theta + problem.variance / batch_size  # E g^2
        momentum = beta**2 * momentum + 2 * beta * h * cross + gradient
        cross = beta * cross + h * theta  # of the old theta and the new m
        theta = theta - 2 * rates * cross + rates.square() * momentum
        cross = cross - rates * momentum
    return Moments(theta, cross, momentum)


def steady_state(problem: NoisyQuadratic, rule: Descent, lr: Tensor, batch_size: Tensor) -> Tensor:
    """E theta^2 to which a constant learning rate and batch size lead; [K] to [K, d].

    r c / B * (1 + beta) / ((1 - beta) h (2 (1 + beta) - r h))    r = lr h^-p
    """
    h, beta, rates = problem.curvature, rule.momentum, rule.rates(problem, lr)
    noise = rates * problem.variance / batch_size[..., None]
    return noise * (1 + beta) / ((1 - beta) * h * (2 * (1 + beta) - rates * h))


def steps_to(
    target: float, problem: NoisyQuadratic, rule: Descent, lr: Tensor, batch_size: Tensor
) -> Tensor:
    """Return the step at which the expected loss crosses a target, [K]; inf where it never does.

    A step multiplies (theta_t, theta_(t-1)) by T = [[a, -beta], [1, 0]], a = 1 + beta - r h. As
    T^2 = a T - beta, every power of T is u T + v: steps are doubled, then bisected, at a few
    products each. It is the first such step wherever the loss falls on the way.

    Args:
        lr, batch_size: [K], constant.
    """
    beta, trace = rule.momentum, 1 + rule.momentum - rule.rates(problem, lr) * problem.curvature
    steady = steady_state(problem, rule, lr, batch_size)
    lagged = trace / (1 + beta) * steady  # covariance of theta_t and theta_(t-1)

    def product(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        (u, v), (u2, v2) = first, second
        return [trace * (u * u2) + u * v2 + v * u2, v * v2 - beta * (u * u2)]

    def above(power: list[Tensor]) -> Tensor:
        """Whether the loss is above the target after that many steps; [K]."""
        u, v = power
        first, second = trace * u + v, -beta * u  # the upper row of T^t
        missing = steady * (first.square() + second.square()) + 2 * lagged * first * second
        squares = (first + second).square() * problem.start + steady - missing
        return problem.loss(squares) > target

    one, zero = torch.ones_like(trace), torch.zeros_like(trace)
    powers = [[one, zero]]  # T^(2^k)
    while (never := above(powers[-1])).any() and len(powers) <= MOST_DOUBLINGS:
        powers.append(product(powers[-1], powers[-1]))
    steps, reached = torch.zeros_like(lr), [zero, one]  # the last one above the target
    for exponent in reversed(range(len(powers))):
        further = product(reached, powers[exponent])
        goes_on = above(further)
        steps += goes_on * 2.0**exponent
        reached = [
            torch.where(goes_on[:, None], *pair) for pair in zip(further, reached, strict=True)
        ]
    return torch.where(never, math.inf, steps + 1)


def fewest_steps(
    target: float, problem: NoisyQuadratic, rule: Descent, batch_size: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the steps to a target at each batch size's best learning rate, and that; [K] each.

    Learning rates are tried up to that whose steady state is the target, or that which diverges.
    """
    low, high = torch.zeros_like(batch_size), torch.full_like(batch_size, rule.largest_lr(problem))
    for _ in range(50):
        middle = (low + high) / 2
        reaches = problem.loss(steady_state(problem, rule, middle, batch_size)) < target
        low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
    steps, lr = torch.full_like(low, math.inf), low
    for octaves in (torch.linspace(-8, -0.01, 24), torch.linspace(-0.3, 0.3, 9)):  # coarse, fine
        centre = lr
        for factor in (2.0**octaves).tolist():
            tried = torch.minimum(centre * factor, low)
            found = steps_to(target, problem, rule, tried, batch_size)
            lr = torch.where(found < steps, tried, lr)
            steps = torch.minimum(steps, found)
    return steps, lr


class Schedules(NamedTuple):
    """Schedules of SGD in stages of equally many steps."""

    losses: Tensor  # expected, at the end, [K]
    batch_sizes: Tensor  # of each stage, [K, stages]; not rounded
    lrs: Tensor  # [K, stages]


def best_schedules(
    problem: NoisyQuadratic,
    *,
    samples: float,
    steps: Tensor,
    lr: float | None = None,
    stages: int = 16,
    iterations: int = 200,
) -> Schedules:
    """Search the schedule of least expected loss that takes so many samples in so many steps.

    A loss is differentiable in batch sizes and learning rates, and L-BFGS finds a minimum; that it
    is no local one is seen by trying, not proven.

    Args:
        steps: [K], float64, budgets for a schedule each.
        lr: constant, where it is not searched too, stage by stage.
        iterations: of L-BFGS, for all budgets together.
    """
    largest, per_stage = 0.999 * SGD.largest_lr(problem), steps[:, None] / stages
    shares = torch.zeros(len(steps), stages, dtype=torch.float64, requires_grad=True)
    # Learning rates from half of what diverges to a hundredth.
    logits = torch.linspace(0.0, -4.6, stages, dtype=torch.float64).repeat(len(steps), 1)
    searched = [shares] if lr is not None else [shares, logits.requires_grad_()]

    def schedules() -> Schedules:
        lrs = largest * logits.sigmoid() if lr is None else torch.full_like(logits, lr)
        batch_sizes = samples / per_stage * shares.softmax(1)
        squares = problem.start
        for rate, size in zip(lrs.unbind(1), batch_sizes.unbind(1), strict=True):
            # Kept from 0, of which a power below 1 has no slope.
            left = (1 - rate[:, None] * problem.curvature).square().clamp_min(1e-12) ** per_stage
            squares = left * squares + (1 - left) * steady_state(problem, SGD, rate, size)
        return Schedules(problem.loss(squares), batch_sizes, lrs)

    def objective() -> Tensor:
        search.zero_grad()
        total = schedules().losses.log().sum()
        total.backward()
        return total

    search = torch.optim.LBFGS(searched, max_iter=iterations, line_search_fn="strong_wolfe")
    search.step(objective)
    with torch.no_grad():
        return schedules()
