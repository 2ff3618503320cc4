"""What a noisy quadratic shows: where a larger batch no longer pays; how near a policy comes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from gns_pretrain.batch_size import PolicySettings
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, Settings, at_least, one_of
from gns_pretrain.quadratic.expected import (
    SGD,
    Descent,
    best_schedules,
    fewest_steps,
    moments_after,
    steps_to,
)
from gns_pretrain.quadratic.problem import NoisyQuadratic
from gns_pretrain.quadratic.simulation import NUM_SAMPLES, Factor, plan, simulate
from gns_pretrain.training.schedule import Schedule, ScheduleSettings

RULES = {
    "SGD": SGD,
    "momentum 0.9": Descent(momentum=0.9),
    "preconditioner H^-1/2": Descent(power=0.5),
}
TRIALS = 8  # seeds that choose a learning rate
Policies = dict[str, tuple[int, PolicySettings]]  # by name; each with its first batch size


@dataclass(frozen=True)
class Scaling:
    """Steps to a target against batch size, at the best learning rate of each."""

    rule: str
    points: list[tuple[float, float, float]]  # batch size, steps, learning rate
    least_steps: float  # without noise
    least_samples: float  # of any batch size
    critical_batch: float  # their ratio, where the curve's asymptotes meet (arXiv:1812.06162)
    # Expected Euclidean ones at the start and at the target, of the batch size next to that.
    noise_scales: tuple[float, float]


def scaling(problem: NoisyQuadratic, rule: str, *, target: float, doublings: int = 20) -> Scaling:
    """Try batches of 1 to 2^doublings sequences; InputError if the target is out of reach."""
    sizes = torch.cat([2.0 ** torch.arange(doublings + 1), torch.tensor([math.inf])]).double()
    at_start = problem.loss(problem.start).item()
    if not 0.0 < target < at_start:
        raise InputError(
            f"--target-loss={target:g} must be positive and below the start's {at_start:.3g}"
        )
    steps, lrs = fewest_steps(target, problem, RULES[rule], sizes)
    points = list(zip(sizes.tolist(), steps.tolist(), lrs.tolist(), strict=True))[:-1]
    least_samples = min(size * count for size, count, _ in points)
    critical = least_samples / steps[-1].item()
    near = (sizes - critical).abs().argmin()
    _, at_target = steps_to(target, problem, RULES[rule], lrs[near, None], sizes[near, None])
    start, end = (
        noise / signal
        for squares in (problem.start, at_target[0])
        for noise, signal in [problem.expected_noise_scales(squares)["euclidean"]]
    )
    return Scaling(rule, points, steps[-1].item(), least_samples, critical, (start, end))


@dataclass
class RankingSettings(Settings):
    """Runs in which policies are compared."""

    section: ClassVar[str] = "--"

    batch_size: Annotated[int, About("sequences of the first step"), at_least(NUM_SAMPLES)] = 16
    samples: Annotated[int, About("sequences of a run"), at_least(1)] = 16384
    seeds: Annotated[int, About("runs of a policy that measures"), at_least(2)] = 32
    measure_every: Annotated[int, About("steps between measurements"), at_least(1)] = 10
    overhead: Annotated[
        float,
        About("fixed time of a step, in that of a sequence, as goodput finds it"),
        at_least(0),
    ] = 16.0
    schedule: Annotated[str, About("of the learning rate"), one_of("cosine", "constant", "wsd")] = (
        "cosine"
    )

    def __post_init__(self) -> None:
        """Check that samples are whole and stages possible."""
        super().__post_init__()
        if self.batch_size % NUM_SAMPLES or self.samples < 16 * self.batch_size:
            raise InputError(
                f"--batch-size={self.batch_size} must be a multiple of {NUM_SAMPLES}, so many "
                f"micro-batches are compared, and at most a 16th of --samples={self.samples}"
            )

    @property
    def factor(self) -> Factor:
        """Learning rate over its peak, after so many samples."""
        shape = ScheduleSettings(kind=self.schedule, warmup_fraction=0.0)
        return Schedule(shape, self.batch_size, self.samples // self.batch_size).factor

    @property
    def policies(self) -> Policies:
        """Those that there are; with lr scaling and rounding of their own."""
        first, samples = self.batch_size, self.samples
        found = {
            "staged, x2 by quarters": PolicySettings(
                "staged",
                stage_tokens=[samples * k // 4 for k in (1, 2, 3)],
                stage_sizes=[first * k for k in (2, 4, 8)],
            ),
            "linear ramp to x16": PolicySettings(
                "linear_ramp", ramp_size=16 * first, ramp_tokens=samples
            ),
            "exponential, x2 by fifths": PolicySettings("exponential", growth_tokens=samples // 5),
            "seesaw": PolicySettings("seesaw"),
        }
        for estimate, thetas in (("plug_in", (0.3, 0.6, 0.9)), ("debiased", (0.6, 1.2))):
            for theta in thetas:
                found[f"adaptive {estimate}, theta {theta}"] = PolicySettings(
                    "adaptive", geometry="euclidean", estimate=estimate, theta=theta
                )
        for estimate in ("debiased", "cross_fitted"):
            found[f"goodput {estimate}"] = PolicySettings(
                "goodput", geometry="euclidean", estimate=estimate
            )
        for price in (0.1, 0.2):
            found[f"progress, price {price}"] = PolicySettings(
                "progress", geometry="euclidean", price=price
            )
        for theta in (0.3, 0.9):
            found[f"norm test, theta {theta}"] = PolicySettings("norm_test", theta=theta)
        constant = {f"constant {size}": size for size in (first, 4 * first, 16 * first)}
        return {name: (first, policy) for name, policy in found.items()} | {
            name: (size, PolicySettings()) for name, size in constant.items()
        }


@dataclass(frozen=True)
class Result:
    """A policy at its best peak learning rate, and what other schedules reach in its steps."""

    lr: float  # peak
    steps: float  # mean over seeds
    last_batch: float  # likewise
    loss: float  # expected, or the mean over seeds
    error: float | None = None  # standard error of that mean; None: exact
    time: float = math.nan  # of all steps, in that of one sequence
    constant: float = math.nan  # expected loss of a constant batch of samples / steps
    best: float = math.nan  # of the best schedule

    @property
    def excess(self) -> float:
        """Loss relative to the best schedule's."""
        return self.loss / self.best


def ranking(
    problem: NoisyQuadratic, settings: RankingSettings, policies: Policies
) -> dict[str, Result]:
    """Compare policies of SGD; nearest to the best schedule of its steps first."""
    found = [tuned_result(problem, settings, *policy) for policy in policies.values()]
    steps = torch.tensor([result.steps for result in found], dtype=torch.float64)
    bounds = zip(*frontier(problem, settings, steps), strict=True)
    results = [
        replace(
            result,
            time=settings.samples + settings.overhead * result.steps,
            constant=constant,
            best=best,
        )
        for result, (constant, best) in zip(found, bounds, strict=True)
    ]
    named = zip(policies, results, strict=True)
    return dict(sorted(named, key=lambda pair: pair[1].excess))


def frontier(
    problem: NoisyQuadratic, settings: RankingSettings, steps: Tensor
) -> tuple[list[float], list[float]]:
    """Expected losses of the constant batch and of the best schedule with so many steps, [K]."""
    constant = []
    for count in steps.round().int().tolist():
        size = settings.samples / count
        of_steps = [(settings.factor(round(k * size)), size) for k in range(count)]
        constant.append(tuned(problem, of_steps)[1])
    best = best_schedules(problem, samples=settings.samples, steps=steps.round()).losses
    return constant, best.tolist()


def tuned_result(
    problem: NoisyQuadratic, settings: RankingSettings, batch_size: int, policy: PolicySettings
) -> Result:
    """Tune the learning rate: exactly for a policy that measures nothing, else on other seeds."""
    budget = (batch_size, settings.samples, settings.factor)
    if policy.reads is None:
        of_steps = list(plan(policy, *budget))
        lr, loss = tuned(problem, of_steps)
        return Result(lr, len(of_steps), of_steps[-1][1], loss)
    tried = learning_rates(problem)[-12:]
    run = partial(
        simulate,
        problem,
        policy,
        *budget,
        measure_every=settings.measure_every,
        overhead=settings.overhead,
    )
    trials = run(lrs=tried.repeat(TRIALS).tolist(), seed=1)
    lr = tried[trials.losses.nan_to_num(math.inf).view(TRIALS, -1).mean(0).argmin()].item()
    runs = run(lrs=[lr] * settings.seeds)
    losses = runs.losses.nan_to_num(math.inf)
    return Result(
        lr,
        steps=sum(map(len, runs.batch_sizes)) / settings.seeds,
        last_batch=sum(sizes[-1] for sizes in runs.batch_sizes) / settings.seeds,
        loss=losses.mean().item(),
        error=losses.std().item() / settings.seeds**0.5,
    )


def tuned(problem: NoisyQuadratic, of_steps: list[tuple[float, float]]) -> tuple[float, float]:
    """The best peak learning rate of a plan, and its expected loss."""
    lrs = learning_rates(problem)
    losses = problem.loss(moments_after(of_steps, problem, SGD, lrs).theta).nan_to_num(math.inf)
    return lrs[losses.argmin()].item(), losses.min().item()


def learning_rates(problem: NoisyQuadratic) -> Tensor:
    """Peaks that are tried, [16], each 1.4 times the last one, to just below what diverges."""
    return SGD.largest_lr(problem) * 2 ** torch.linspace(-7.51, -0.01, 16, dtype=torch.float64)
