"""AdaGrad-Norm, AdaGO and Subset-Norm on one process: against their formulas in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.optim import AdaGO, AdaGradNorm, SubsetNorm
from tests.unit.optim.test_spectral import ROUNDING, five_quintic_steps

MATRICES = [(6, 6), (9, 4), (4, 9)]
LR, DECAY, STEPS = 0.1, 0.2, 5


def weights_of(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) / 4 for shape in shapes]


def stepped(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(STEPS):
        shapes = [tuple(weight.shape) for weight in weights]
        for weight, gradient in zip(weights, gradients(step, shapes), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach().double() for weight in weights]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
    )


def test_adagrad_norm_by_hand():
    # b^2 = 3^2 + 4^2, then + 12^2: steps of 1 x (3, 4) / 5 and of 1 x (0, 12) / 13.
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = AdaGradNorm([weight], lr=1.0, initial_norm=1e-12)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.4, 0.2]))
    weight.grad = torch.tensor([0.0, 12.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.4, 0.2 - 12 / 13]))


def test_adagrad_norm_follows_its_formula_over_all_parameters_with_one_number_of_state():
    shapes = [(5, 3), (7,)]
    weights = weights_of(shapes)
    optimizer = AdaGradNorm(weights, lr=LR, weight_decay=DECAY, initial_norm=0.5)
    expected, square_sum = [weight.detach().double() for weight in weights], 0.25
    for step in range(STEPS):
        drawn = [gradient.double() for gradient in gradients(step, shapes)]
        square_sum += sum(gradient.square().sum().item() for gradient in drawn)
        for weight, gradient in zip(expected, drawn, strict=True):
            weight.mul_(1 - LR * DECAY).sub_(LR / math.sqrt(square_sum) * gradient)
    torch.testing.assert_close(stepped(weights, optimizer), expected, rtol=0, atol=STEPS * 2**-22)
    assert state_bytes(optimizer) == 4


@pytest.mark.parametrize(("nesterov", "floor"), [(False, 0.0), (True, 0.45)])
def test_adago_follows_its_formulas_with_one_number_a_matrix_beside_the_momentum(nesterov, floor):
    weights, limit = weights_of(MATRICES), 1.4  # of norms near 1.5
    optimizer = AdaGO(
        weights,
        LR,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=DECAY,
        norm_limit=limit,
        floor=floor,
        initial_norm=0.5,
    )
    expected = [weight.detach().double() for weight in weights]
    momenta, sums = [torch.zeros_like(weight) for weight in expected], [0.25] * len(expected)
    clipped = floored = 0
    for step in range(STEPS):
        for i, gradient in enumerate(gradients(step, MATRICES)):
            gradient = gradient.double()
            norm = min(gradient.norm().item(), limit)
            clipped += norm == limit
            sums[i] += norm**2
            momenta[i] = 0.9 * momenta[i] + gradient
            along = five_quintic_steps(gradient + 0.9 * momenta[i] if nesterov else momenta[i])
            length = LR * max(floor, norm / math.sqrt(sums[i]))
            floored += length == LR * floor
            scale = math.sqrt(max(1.0, gradient.shape[0] / gradient.shape[1]))
            expected[i] = (1 - length * DECAY) * expected[i] - length * scale * along
    assert 0 < clipped < STEPS * len(MATRICES)
    assert (floored > 0) == (floor > 0)
    found = stepped(weights, optimizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=STEPS * LR * 1.5 * ROUNDING)
    assert state_bytes(optimizer) == sum(4 * rows * columns + 4 for rows, columns in MATRICES)


def subspace(gradient: Tensor, rank: int, iterations: int, guess: Tensor) -> Tensor:
    for _ in range(iterations):
        guess = torch.linalg.qr(gradient.T @ (gradient @ guess)).Q
    return guess


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_subset_norm_follows_its_formulas(momentum):
    weights = weights_of(MATRICES)
    optimizer = SubsetNorm(
        weights,
        LR,
        momentum=momentum,
        beta2=0.7,
        weight_decay=DECAY,
        rank_share=0.5,
        refresh_every=3,
        epsilon=1e-3,
    )
    expected = [weight.detach().double() for weight in weights]
    rows = [torch.zeros(shape[0], 1, dtype=torch.float64) for shape in MATRICES]
    ranks = [3, 2, 2]
    bases = [
        torch.randn(n, r, generator=torch.Generator().manual_seed(0)).double()
        for (_, n), r in zip(MATRICES, ranks, strict=True)
    ]
    averages = [torch.empty(0) for _ in MATRICES]
    for step in range(STEPS):
        for i, gradient in enumerate(gradients(step, MATRICES)):
            gradient = gradient.double()
            if step % 3 == 0:
                bases[i] = subspace(gradient, ranks[i], 2, bases[i])
                averages[i] = torch.zeros(len(gradient), ranks[i], dtype=torch.float64)
            rows[i] = 0.7 * rows[i] + 0.3 * gradient.square().sum(1, keepdim=True)
            inside = gradient @ bases[i]
            averages[i] = momentum * averages[i] + (1 - momentum) * inside
            corrected = averages[i] / (1 - momentum ** (step % 3 + 1))
            update = corrected @ bases[i].T + gradient - inside @ bases[i].T
            update = update / ((rows[i] / (1 - 0.7 ** (step + 1))).sqrt() + 1e-3)
            expected[i] = (1 - LR * DECAY) * expected[i] - LR * update
    found = stepped(weights, optimizer)
    # Weights are below 4, and entries of an update below 4 too; products add up 9 terms.
    torch.testing.assert_close(found, expected, rtol=0, atol=STEPS * 9 * 4 * 2**-23)
    with_momentum = sum(
        4 * (m * r + n * r) for (m, n), r in zip(MATRICES, ranks, strict=True) if momentum
    )
    assert state_bytes(optimizer) == with_momentum + sum(4 * m + 4 for m, _ in MATRICES)


def test_subspace_holds_the_gradients_leading_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, 8, generator=generator)).Q for k in (40, 24))
    singular = torch.tensor([9.0, 7.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    weight = nn.Parameter(torch.zeros(40, 24))
    optimizer = SubsetNorm([weight], rank_share=4 / 24)
    weight.grad = left * singular @ right.T
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    # Two iterations leave at most (0.1 / 3)^4 of a random start, of which the others are 5 times.
    overlap = torch.linalg.svdvals(basis.T @ right[:, :4])
    torch.testing.assert_close(overlap, torch.ones(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: AdaGO([w(2, 2)], floor=1.0), r"floor=1\.0 must be at least 0 and below 1"),
        (lambda w: AdaGO([w(2, 2)], norm_limit=0.0), r"norm_limit=0\.0 must be positive"),
        (lambda w: AdaGO([w(3)]), r"AdaGO takes matrices, .* shape \[3\]"),
        (lambda w: AdaGradNorm([w(3)], initial_norm=0.0), r"initial_norm=0\.0 must be positive"),
        (lambda w: SubsetNorm([w(3)]), r"SubsetNorm takes matrices, .* shape \[3\]"),
        (lambda w: SubsetNorm([w(2, 2)], rank_share=1.0), r"rank_share=1\.0 must lie between"),
        (lambda w: SubsetNorm([w(2, 2)], refresh_every=0), r"refresh_every=0 must be at least 1"),
        (lambda w: SubsetNorm([w(2, 2)], beta2=1.0), r"beta2=1\.0 must be at least 0 and below 1"),
    ],
)
def test_bad_argument_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make(lambda *shape: nn.Parameter(torch.ones(shape)))
