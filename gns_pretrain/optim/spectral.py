"""Steepest descent in the nuclear geometry: what Muon and specSGD share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.directions import matrix_sign
from gns_pretrain.geometry.newton_schulz import orthogonalize
from gns_pretrain.optim.adamw import AdamWPart, Composite, with_adamw
from gns_pretrain.optim.base import (
    Group,
    OptimizerSettings,
    Rule,
    block_matrices,
    check_averages,
    check_choice,
    check_nesterov,
    descend,
    gradients_of,
    summed_momentum,
)
from gns_pretrain.parallel.matrix_work import MatrixWork, replica_group
from gns_pretrain.parallel.shard_layout import local_parts

MATRIX_SIGNS = ("newton_schulz", "exact")
COEFFICIENTS = ("muon", "polar_express")
PRECISIONS = ("auto", "float32", "bfloat16")

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
    """Settings of a matrix rule for the block weights, with AdamW for the rest."""

    momentum: float = 0.0  # m = beta m + g; 0 keeps no state
    nesterov: bool = False  # orthogonalise g + beta m instead of m
    matrix_sign: str = "newton_schulz"  # newton_schulz | exact, by eigenvectors in float64
    steps: int = 5  # of Newton–Schulz; the paper's value
    coefficients: str = "muon"  # muon, the paper's | polar_express (arXiv:2505.16932)
    scaling: str = "original"  # original, the paper's | match_rms_adamw | spectral | none
    precision: str = "auto"  # of Newton–Schulz: auto (bfloat16 on GPUs) | float32 | bfloat16
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for embedding, output and norms

    def __post_init__(self) -> None:
        """Check each setting by itself."""
        super().__post_init__()
        check_averages("optimizer", momentum=self.momentum)
        check_choice("optimizer.matrix_sign", self.matrix_sign, MATRIX_SIGNS)
        check_choice("optimizer.coefficients", self.coefficients, COEFFICIENTS)
        check_choice("optimizer.scaling", self.scaling, list(SCALINGS))
        check_choice("optimizer.precision", self.precision, PRECISIONS)
        if self.steps < 1:
            raise InputError(f"optimizer.steps={self.steps} must be at least 1; 5 is usual")
        check_nesterov(self.nesterov, momentum=self.momentum, usual=0.95)


class Spectral(Rule):
    """Matrix sign of the momentum, with decoupled weight decay.

        m = beta m + g;  u = g + beta m (Nesterov) or m
        w = (1 - lr * weight_decay) w - lr * scaling(rows, columns) * sign(u)

    Tied to tokens, g comes with the gain of `tied_gain`, so that old and new gradients weigh alike.
    sign(U S V^T) = U V^T, nearly so by Newton–Schulz steps. Where ranks hold parts or copies, each
    matrix is orthogonalised by one of them (`MatrixWork`); all hold their own rows of momentum.

    Args:
        matrices: 2-dimensional, all of one layout; the same on every rank.
        settings: of the rule; its `adamw` is left to others.
        work: carries the matrices between ranks.
    """

    def __init__(
        self, matrices: list[nn.Parameter], settings: SpectralSettings, work: MatrixWork
    ) -> None:
        defaults = {
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
        }
        super().__init__(matrices, defaults)
        self.settings = settings
        self.work = work
        on_cpu = matrices[0].device.type == "cpu"
        self.precision = {
            "auto": torch.float32 if on_cpu else torch.bfloat16,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
        }[settings.precision]
        if settings.matrix_sign == "exact":
            self.precision = torch.float32

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """One step; all ranks take it together."""
        for group, matrices in trained:
            assert len(matrices) == len(group["params"]), "a block matrix has no gradient"
            scaling = SCALINGS[self.settings.scaling]

            def rows_of(
                members: list[int],
                group: Group = group,
                matrices: list[nn.Parameter] = matrices,
            ) -> list[Tensor]:
                return self._momentum_step(group, [matrices[i] for i in members])

            for members, signs in self.work.results(rows_of, self._sign, dtype=self.precision):
                chosen = [matrices[i] for i in members]
                rows, columns = chosen[0].shape
                descend(
                    chosen,
                    [sign.to(chosen[0].dtype) for sign in signs],
                    lr=group["lr"] * scaling(rows, columns),
                    shrink=1 - group["lr"] * group["weight_decay"],
                )

    def _momentum_step(self, group: Group, matrices: list[nn.Parameter]) -> list[Tensor]:
        """This rank's rows of what is to be orthogonalised."""
        gradients = local_parts(gradients_of(matrices))
        if group["momentum"] == 0:
            return gradients
        momenta = local_parts(self.momenta(matrices))
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


def build_spectral(model: nn.Module, settings: SpectralSettings) -> Composite:
    """The rule over the block matrices of a model that is already laid over ranks, and AdamW."""
    matrices = block_matrices(model)
    work = MatrixWork(matrices, replica_group(model))
    return with_adamw(
        model,
        Spectral(matrices, settings, work),
        settings.adamw,
        decay_matrices_only=settings.decay_matrices_only,
    )


# Muon: the orthogonalised Nesterov momentum of each block matrix, AdamW for the rest.


@dataclass
class MuonSettings(SpectralSettings):
    """Settings of Muon as the paper runs it (arXiv:2602.03001, Section 2.1)."""

    name: str = "muon"
    momentum: float = 0.95  # the paper searches 0.7 to 0.999
    nesterov: bool = True


def build_muon(model: nn.Module, settings: MuonSettings) -> Composite:
    """Muon for a model that is already laid over ranks."""
    return build_spectral(model, settings)


# Stochastic spectral descent: Muon without momentum, the nuclear geometry's own step.


@dataclass
class SpecSGDSettings(SpectralSettings):
    """Settings of specSGD (arXiv:2602.03001, Section 2.1): no momentum."""

    name: str = "specsgd"


def build_specsgd(model: nn.Module, settings: SpecSGDSettings) -> Composite:
    """specSGD for a model that is already laid over ranks."""
    return build_spectral(model, settings)
