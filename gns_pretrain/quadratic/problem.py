"""The problem of arXiv:1907.04164, and its noise scales in closed form.

    loss(theta) = 1/2 sum_i h_i theta_i^2        gradient of B sequences ~ N(h theta, c / B)

Curvature H and noise covariance C are diagonal, with h and c. That paper has h_i = 1/i, C = H,
theta_0 ~ N(0, 1) and 10,000 coordinates. Expected values are over noise and start; tensors are
float64.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from gns_pretrain.fields import About, Settings, at_least, positive
from gns_pretrain.noise_scale.equations import (
    euclidean_signal_total,
    manhattan_noise_total,
    manhattan_signal_total,
)


@dataclass
class QuadraticSettings(Settings):
    """A quadratic whose curvature, and the variance of whose noise, are power laws."""

    section: ClassVar[str] = "--"

    dimension: Annotated[int, About("coordinates"), at_least(1)] = 256
    exponent: Annotated[float, About("e of the curvature, h_i = i^-e"), at_least(0)] = 1.0
    noise_exponent: Annotated[
        float | None,
        About("e of the noise's variance i^-e (default: the curvature's, C = H); 0: isotropic"),
        at_least(0),
    ] = None
    noise_level: Annotated[float, About("tr C / tr H"), positive()] = 1.0

    def build(self) -> "NoisyQuadratic":
        """Build the problem, with theta_0 ~ N(0, 1)."""
        index = torch.arange(1, self.dimension + 1, dtype=torch.float64)
        curvature = index**-self.exponent
        of_noise = self.exponent if self.noise_exponent is None else self.noise_exponent
        variance = index**-of_noise
        variance *= self.noise_level * curvature.sum() / variance.sum()
        return NoisyQuadratic(curvature, variance, torch.ones_like(curvature))


@dataclass(frozen=True)
class NoisyQuadratic:
    """Any diagonal one."""

    curvature: Tensor  # h, [d], positive
    variance: Tensor  # c, [d], of each coordinate of one sequence's gradient
    start: Tensor  # E theta_0^2, [d], of a normal theta_0 with mean 0

    def loss(self, squares: Tensor) -> Tensor:
        """Loss from theta^2, expected loss from E theta^2; [..., d] to [...]."""
        return (self.curvature * squares).sum(-1) / 2

    def noise_scales(
        self, theta: Tensor, *, shape: tuple[int, int] | None = None
    ) -> dict[str, tuple[float, float]]:
        """N and M of each geometry at a point (Eqs. 6, 13 and 17 of arXiv:2602.03001).

        Args:
            theta: [d].
            shape: of theta as one matrix, for the nuclear scale.
        """
        gradient = self.curvature * theta
        euclidean = (self.variance.sum(), euclidean_signal_total(gradient))
        manhattan = (manhattan_noise_total(self.variance), manhattan_signal_total(gradient))
        found = {"euclidean": euclidean, "manhattan": (manhattan[0] ** 2, manhattan[1] ** 2)}
        if shape is not None:
            # Coordinates are independent, so that the rows' covariance is diagonal.
            rows = self.variance.view(shape).sum(int(shape[0] <= shape[1]))
            nuclear_norm = torch.linalg.matrix_norm(gradient.view(shape), "nuc")
            found["nuclear"] = (rows.sqrt().sum() ** 2, nuclear_norm**2)
        return {name: (noise.item(), signal.item()) for name, (noise, signal) in found.items()}

    def expected_noise_scales(self, squares: Tensor) -> dict[str, tuple[float, float]]:
        """N, and M of the expected norm, where theta is normal with mean 0, as SGD keeps it.

            E||g||_2^2 = sum_i h_i^2 E theta_i^2    E||g||_1 = (2 / pi)^(1/2) sum_i h_i sd(theta_i)

        Args:
            squares: E theta^2, [d].
        """
        euclidean, (noise, signal) = self.noise_scales(squares.sqrt()).values()
        return {"euclidean": euclidean, "manhattan": (noise, signal * 2 / math.pi)}


class QuadraticModel(nn.Module):
    """The problem as a module, for whatever trains or measures one.

    A sequence is a row x ~ N(0, C) of noise, whose loss is 1/2 sum h theta^2 + <x, theta> and whose
    gradient, therefore, is h theta + x.

    Args:
        theta: the start, [d] or, as a matrix, [m, n]; copied.
    """

    def __init__(self, problem: NoisyQuadratic, theta: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(theta.clone())
        self.curvature = problem.curvature.to(theta.dtype).view_as(theta)

    def forward(self, noise: Tensor) -> Tensor:
        """Return the mean loss of the sequences `noise`, [B, d]; 0-dimensional."""
        quadratic = (self.curvature * self.weight.square()).sum() / 2
        return quadratic + (noise @ self.weight.flatten()).mean()
