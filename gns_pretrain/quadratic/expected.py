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
) -> tuple[Tensor, Tensor]:
    """Return the step at which the expected loss crosses a target, [K], and E theta^2 there.

    A step multiplies (theta_t, theta_(t-1)) by T = [[a, -beta], [1, 0]], a = 1 + beta - r h. As
    T^2 = a T - beta, every power of T is u T + v: steps are doubled, then bisected, at a few
    products each. It is the first such step wherever the loss falls on the way, and inf where the
    loss never comes below.

    Args:
        lr, batch_size: [K], constant.
    """
    beta, trace = rule.momentum, 1 + rule.momentum - rule.rates(problem, lr) * problem.curvature
    steady = steady_state(problem, rule, lr, batch_size)
    lagged = trace / (1 + beta) * steady  # covariance of theta_t and theta_(t-1)

    def product(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        (u, v), (u2, v2) = first, second
        return [trace * (u * u2) + u * v2 + v * u2, v * v2 - beta * (u * u2)]

    def squares(power: list[Tensor]) -> Tensor:
        """E theta^2 after that many steps; [K, d]."""
        u, v = power
        first, second = trace * u + v, -beta * u  # the upper row of T^t
        missing = steady * (first.square() + second.square()) + 2 * lagged * first * second
        return (first + second).square() * problem.start + steady - missing

    one, zero = torch.ones_like(trace), torch.zeros_like(trace)
    powers = [[one, zero]]  # T^(2^k)
    while (never := problem.loss(squares(powers[-1])) > target).any():
        if len(powers) > MOST_DOUBLINGS:
            break
        powers.append(product(powers[-1], powers[-1]))
    steps, reached = torch.zeros_like(lr), [zero, one]  # the last one above the target
    for exponent in reversed(range(len(powers))):
        further = product(reached, powers[exponent])
        goes_on = problem.loss(squares(further)) > target
        steps += goes_on * 2.0**exponent
        reached = [
            torch.where(goes_on[:, None], *pair) for pair in zip(further, reached, strict=True)
        ]
    crossed = squares(product(reached, powers[0]))
    return torch.where(never, math.inf, steps + 1), crossed


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
            found, _ = steps_to(target, problem, rule, tried, batch_size)
            lr = torch.where(found < steps, tried, lr)
            steps = torch.minimum(steps, found)
    return steps, lr


class Schedules(NamedTuple):
    """Schedules of SGD in stages."""

    losses: Tensor  # expected, at the end, [K]
    batch_sizes: Tensor  # of each stage, [K, stages]; not rounded
    lrs: Tensor  # [K, stages]


def best_schedules(
    problem: NoisyQuadratic,
    *,
    samples: float,
    steps: Tensor,
    lr: float | None = None,
    stages: int = 24,
    updates: int = 300,
) -> Schedules:
    """Search the schedule of least expected loss that takes so many samples in so many steps.

    The loss is differentiable in each stage's batch size and learning rate, and Adam finds a
    minimum; that it is no local one is seen by trying, not proven.

    Args:
        steps: [K], float64, whole; budgets for a schedule each, cut into stages of equally many,
            or of one and none where there are fewer steps than stages.
        lr: constant, where it is not searched too.
        updates: of Adam.
    """
    largest = 0.999 * SGD.largest_lr(problem)
    lengths = (steps[:, None] * torch.linspace(0, 1, stages + 1).double()).round().diff(dim=1)
    # From batches that grow and learning rates that fall, the latter as shares of the largest.
    log_sizes = torch.linspace(-1, 1, stages).double().repeat(len(steps), 1).requires_grad_()
    logits = torch.linspace(2, -2, stages).double().repeat(len(steps), 1).requires_grad_()

    def schedules() -> Schedules:
        lrs = largest * logits.sigmoid() if lr is None else torch.full_like(logits, lr)
        relative = log_sizes.exp()
        batch_sizes = samples * relative / (lengths * relative).sum(1, keepdim=True)
        squares = problem.start
        for rate, size, length in zip(lrs.T, batch_sizes.T, lengths.T, strict=True):
            kept = (1 - rate[:, None] * problem.curvature).abs().clamp_min(1e-30)
            left = (2 * length[:, None] * kept.log()).exp()  # faster than a power
            steady = steady_state(problem, SGD, rate, size)
            squares = left * (squares - steady) + steady
        return Schedules(problem.loss(squares), batch_sizes, lrs)

    adam = torch.optim.Adam([log_sizes, logits] if lr is None else [log_sizes], lr=0.3)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    for _ in range(updates):
        adam.zero_grad()
        schedules().losses.log().sum().backward()
        adam.step()
        cooling.step()
    with torch.no_grad():
        return schedules()
