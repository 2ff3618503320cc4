"""Muon and specSGD: steepest descent in the nuclear geometry (arXiv:2602.03001, Section 2.1).

Muon takes the matrix sign of a Nesterov momentum, specSGD that of the gradient itself. Both update
the weights inside the blocks; AdamW takes embedding, output and norms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gns_pretrain.fields import at_least, one_of
from gns_pretrain.geometry.directions import matrix_sign
from gns_pretrain.geometry.newton_schulz import orthogonalize
from gns_pretrain.model.roles import Role
from gns_pretrain.optim.adamw import AdamWPart, Composite, with_adamw
from gns_pretrain.optim.base import (
    Beta,
    Group,
    OptimizerSettings,
    Rule,
    check_nesterov,
    descend,
    gradients_of,
    summed_momentum,
    trainable,
)
from gns_pretrain.parallel.matrix_ownership import OwnerCompute
from gns_pretrain.parallel.sharding import local_shards, replica_group

# Factor of the update of an [m, n] weight, by name.
SCALINGS: dict[str, Callable[[int, int], float]] = {
    # Muon's own and the paper's.
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # The root mean square of AdamW's updates, so that AdamW's lr serves (arXiv:2502.16982).
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    # The spectral condition for learning features at any width (arXiv:2310.17813).
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}


@dataclass
class SpectralSettings(OptimizerSettings):
    """A matrix rule for the block weights, with AdamW for the rest."""

    momentum: Beta = 0.0  # m = beta m + g; 0 keeps no state
    nesterov: bool = False  # orthogonalise g + beta m instead of m
    # newton_schulz | exact, by eigenvectors in float64
    matrix_sign: Annotated[str, one_of("newton_schulz", "exact")] = "newton_schulz"
    steps: Annotated[int, at_least(1, hint="5 is usual")] = 5  # of Newton–Schulz; the paper's
    # muon, the paper's | polar_express (arXiv:2505.16932)
    coefficients: Annotated[str, one_of("muon", "polar_express")] = "muon"
    # original, the paper's | match_rms_adamw | spectral | none
    scaling: Annotated[str, one_of(*SCALINGS)] = "original"
    # of Newton–Schulz; auto: bfloat16 on GPUs
    precision: Annotated[str, one_of("auto", "float32", "bfloat16")] = "auto"
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for embedding, output and norms

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self.nesterov, self.momentum)

    def build(self, model: nn.Module) -> Composite:
        """Build the rule over the block matrices, and AdamW over the rest."""
        matrices = trainable(model, {Role.MATRIX})
        rule = Spectral(matrices, self, replica_group(model))
        return with_adamw(model, rule, self.adamw, decay_matrices_only=self.decay_matrices_only)


@dataclass
class MuonSettings(SpectralSettings):
    """Muon as the paper runs it."""

    name: str = "muon"
    momentum: Beta = 0.95  # the paper searches 0.7 to 0.999
    nesterov: bool = True


@dataclass
class SpecSGDSettings(SpectralSettings):
    """Stochastic spectral descent: Muon without momentum, the nuclear geometry's own step."""

    name: str = "specsgd"


class Spectral(Rule):
    """Matrix sign of the momentum, with decoupled weight decay.

        m = beta m + g;  u = g + beta m (Nesterov) or m
        w = (1 - lr * weight_decay) w - lr * scaling(rows, columns) * sign(u)

    sign(U S V^T) = U V^T, nearly so by Newton–Schulz steps. Where the weights are sharded or
    replicated, each matrix is orthogonalised by the one rank that owns it (`OwnerCompute`), and the
    momentum stays sharded like the weight. With half-lives kept, g is multiplied by
    `momentum_gain`, so that old and new gradients weigh alike.

    Args:
        matrices: 2-dimensional, all of one layout; the same on every rank.
        replicas: `replica_group` of the model.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        settings: SpectralSettings,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        names = ("lr", "weight_decay", "momentum")
        super().__init__(matrices, {name: getattr(settings, name) for name in names})
        self.settings = settings
        self.compute = OwnerCompute(matrices, replicas)
        on_cpu = matrices[0].device.type == "cpu"
        half = settings.precision == "bfloat16" or (settings.precision == "auto" and not on_cpu)
        exact = settings.matrix_sign == "exact"
        self.precision = torch.bfloat16 if half and not exact else torch.float32

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along the signs, shape by shape; all ranks together."""
        for group, matrices in trained:
            self._update_group(group, matrices)

    def _update_group(self, group: Group, matrices: list[nn.Parameter]) -> None:
        assert len(matrices) == len(group["params"]), "a block matrix has no gradient"
        scaling = SCALINGS[self.settings.scaling]

        def directions(members: list[int]) -> list[Tensor]:
            return self._directions(group, [matrices[i] for i in members])

        for members, signs in self.compute.map(self._sign, directions, dtype=self.precision):
            chosen = [matrices[i] for i in members]
            rows, columns = chosen[0].shape
            descend(
                chosen,
                [sign.to(chosen[0].dtype) for sign in signs],
                lr=group["lr"] * scaling(rows, columns),
                shrink=1 - group["lr"] * group["weight_decay"],
            )

    def _directions(self, group: Group, matrices: list[nn.Parameter]) -> list[Tensor]:
        """Update the momentum; return the local shards of u."""
        gradients = local_shards(gradients_of(matrices))
        if group["momentum"] == 0:
            return gradients
        momenta = local_shards(self.momenta(matrices))
        return summed_momentum(gradients, momenta, group, nesterov=self.settings.nesterov)

    def _sign(self, batch: Tensor) -> Tensor:
        """Matrix sign of each matrix of a batch, [k, m, n]."""
        if self.settings.matrix_sign == "exact":
            return matrix_sign(batch)
        return orthogonalize(
            batch,
            steps=self.settings.steps,
            coefficients=self.settings.coefficients,
            dtype=self.precision,
        )
