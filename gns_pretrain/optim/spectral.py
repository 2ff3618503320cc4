"""Muon and specSGD: steepest descent in the nuclear geometry (arXiv:2602.03001, Section 2.1).

Muon takes the matrix sign of a Nesterov momentum, specSGD that of the gradient itself. Both update
matrices inside the model; AdamW takes embedding, output and norms (`CombinedOptimizer`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gns_pretrain.fields import at_least, checked, one_of
from gns_pretrain.geometry.directions import matrix_sign
from gns_pretrain.geometry.newton_schulz import orthogonalize
from gns_pretrain.model.parametrization import StepSize
from gns_pretrain.model.roles import matrix_shape
from gns_pretrain.optim.adamw import AdamWPart, with_adamw
from gns_pretrain.optim.base import (
    Beta,
    Group,
    OptimizerSettings,
    Rule,
    check_nesterov,
    descend,
    gradients_of,
    summed_momentum,
)
from gns_pretrain.optim.combined import CombinedOptimizer, split_parameters
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


MatrixSign = Annotated[str, one_of("newton_schulz", "exact")]
Steps = Annotated[int, at_least(1, hint="5 is usual")]
Coefficients = Annotated[str, one_of("muon", "polar_express")]
Scaling = Annotated[str, one_of(*SCALINGS)]
Precision = Annotated[str, one_of("auto", "float32", "bfloat16")]


@dataclass
class SpectralSettings(OptimizerSettings):
    """A matrix rule for the block weights, with AdamW for the rest."""

    momentum: Beta = 0.0  # m = beta m + g; 0 keeps no state
    nesterov: bool = False  # orthogonalise g + beta m instead of m
    # newton_schulz | exact, by eigenvectors in float64
    matrix_sign: MatrixSign = "newton_schulz"
    steps: Steps = 5  # of Newton–Schulz; the paper's
    # muon, the paper's | polar_express (arXiv:2505.16932)
    coefficients: Coefficients = "muon"
    # original, the paper's | match_rms_adamw | spectral | none
    scaling: Scaling = "original"
    precision: Precision = "auto"  # of Newton–Schulz; auto: bfloat16 on GPUs
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for embedding, output and norms

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self.nesterov, self.momentum, self.section)

    def build(self, model: nn.Module) -> CombinedOptimizer:
        """Build the rule over the block matrices, and AdamW over the rest."""
        matrices, others = split_parameters(model)
        rule = self.rule(
            matrices,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            matrix_sign=self.matrix_sign,
            steps=self.steps,
            coefficients=self.coefficients,
            scaling=self.scaling,
            precision=self.precision,
            process_group=replica_group(model),
        )
        return with_adamw(rule, others, self.adamw, decay_matrices_only=self.decay_matrices_only)

    def rule(self, matrices: list[Group], **options: Any) -> "Muon":
        """Build the rule over groups of matrices, given what all such rules take."""
        return Muon(matrices, **options)


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


class Muon(Rule):
    """Matrix sign of the momentum, with decoupled weight decay (arXiv:2602.03001, Section 2.1).

        m = beta m + g;  u = g + beta m (Nesterov) or m
        w = (1 - lr * weight_decay) w - lr * scaling(rows, columns) * sign(u)

    sign(U S V^T) = U V^T, nearly so by Newton–Schulz steps, of a weight's matrix view
    [shape[0], rest]. With half-lives kept, g is multiplied by `momentum_gain`, so that old and new
    gradients weigh alike.

    Under FSDP2, HSDP, tensor parallelism or FSDP2 with it, each matrix is brought to one of the
    ranks that share it, orthogonalised there and sent back, while the next ones arrive; the state
    is one buffer per matrix, sharded like it. All ranks step together. A matrix without a gradient
    is skipped. Ranks agree on which these are: DDP and FSDP2 reduce a weight's gradient on all
    ranks or on none, and a gradient set by hand has to be set on all.

    Args:
        params, lr, momentum, weight_decay: as in `Rule`; of at least 2 dimensions each
            (`split_parameters`). A group with `transposed=True` has weights stored as [in, out],
            as GPT-2's Conv1D are: rows and columns change places in `scaling`.
        nesterov: orthogonalise g + beta m instead of m.
        steps: of Newton–Schulz.
        coefficients: of Newton–Schulz, "muon" or "polar_express" (arXiv:2505.16932).
        matrix_sign: "newton_schulz", or "exact": by eigenvectors, in float64.
        scaling: "original", max(1, rows / columns)^(1/2); "match_rms_adamw",
            0.2 max(rows, columns)^(1/2); "spectral", (rows / columns)^(1/2); or "none".
        precision: of Newton–Schulz, "float32", "bfloat16", or "auto": bfloat16 but on CPUs.
        process_group: under DDP the model's `process_group`, whose ranks then share the work;
            None: each rank orthogonalises all matrices that it has whole.

    Raises:
        InputError: as in `Rule`; or a parameter that is no matrix, or is sharded along a dimension
            that its matrix view merges with another.
    """

    takes_matrices = True
    has_fixed_steps = True  # as long as the learning rate says, whatever the gradient

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: Steps = 5,
        coefficients: Coefficients = "muon",
        matrix_sign: MatrixSign = "newton_schulz",
        scaling: Scaling = "original",
        precision: Precision = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_nesterov(nesterov, momentum)
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.nesterov = nesterov
        grows = scaling == "match_rms_adamw"
        self.step_size = StepSize.ROOT_WIDTH if grows else StepSize.SPECTRAL_NORM
        self.exact = matrix_sign == "exact"
        self.precision = precision
        self._scaling = SCALINGS[scaling]
        self._orthogonalize = partial(orthogonalize, steps=steps, coefficients=coefficients)
        # By the matrices that have a gradient, most often all.
        self._owner_compute = lru_cache(maxsize=16)(
            lambda *matrices: OwnerCompute(matrices, process_group)
        )
        self._owner_compute(*(matrix for group in self.param_groups for matrix in group["params"]))

    def update(self, trained: list[tuple[Group, list[nn.Parameter]]]) -> None:
        """Step along the signs, shape by shape; all ranks together."""
        matrices = [matrix for _, chosen in trained for matrix in chosen]
        groups = [group for group, chosen in trained for _ in chosen]
        if not matrices:
            return
        precision = self._precision_for(matrices[0])

        def sign(batch: Tensor) -> Tensor:  # [k, m, n]
            return matrix_sign(batch) if self.exact else self._orthogonalize(batch, dtype=precision)

        def directions(members: list[int]) -> list[Tensor]:
            return [
                direction
                for group, run in runs_of(groups, members)
                for direction in self._directions(group, [matrices[i] for i in run])
            ]

        owner_compute = self._owner_compute(*matrices)
        for members, signs in owner_compute.map(sign, directions, dtype=precision):
            sign_of = dict(zip(members, signs, strict=True))
            for group, run in runs_of(groups, members):
                chosen = [matrices[i] for i in run]
                along = [
                    sign_of[i].to(weight.dtype).view(weight.shape)
                    for i, weight in zip(run, local_shards(chosen), strict=True)
                ]
                self.step_along(group, chosen, along, scaling=self.sign_scaling(group, chosen[0]))

    def step_along(
        self, group: Group, matrices: list[nn.Parameter], signs: list[Tensor], *, scaling: float
    ) -> None:
        """Change matrices of one shape in place; `signs` are local shards."""
        descend(
            matrices,
            signs,
            lr=group["lr"] * scaling,
            shrink=1 - group["lr"] * group["weight_decay"],
        )

    def sign_scaling(self, group: Group, matrix: Tensor) -> float:
        """Factor of the matrix sign beside the learning rate, by the whole matrix's shape."""
        rows, columns = matrix_shape(matrix)
        swapped = group.get("transposed", False)
        return self._scaling(columns, rows) if swapped else self._scaling(rows, columns)

    def _directions(self, group: Group, matrices: list[nn.Parameter]) -> list[Tensor]:
        """Update the momentum; return the local shards of u, as matrices."""
        directions = gradients_of(matrices)
        if group["momentum"] != 0:
            momenta = self.momenta(matrices)
            directions = summed_momentum(
                local_shards(directions), local_shards(momenta), group, nesterov=self.nesterov
            )
        return [direction.flatten(1) for direction in local_shards(directions)]

    def _precision_for(self, matrix: Tensor) -> torch.dtype:
        """That of the sign, in which results travel."""
        if self.exact:
            return torch.promote_types(matrix.dtype, torch.float32)
        on_cpu = matrix.device.type == "cpu"
        half = self.precision == "bfloat16" or (self.precision == "auto" and not on_cpu)
        return torch.bfloat16 if half else torch.float32


class SpecSGD(Muon):
    """Stochastic spectral descent: Muon without momentum, w = ... - lr * scaling * sign(g).

    It keeps no state. The arguments are those of `Muon`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        *,
        weight_decay: float = 0.0,
        steps: Steps = 5,
        coefficients: Coefficients = "muon",
        matrix_sign: MatrixSign = "newton_schulz",
        scaling: Scaling = "original",
        precision: Precision = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum=0.0,
            nesterov=False,
            weight_decay=weight_decay,
            steps=steps,
            coefficients=coefficients,
            matrix_sign=matrix_sign,
            scaling=scaling,
            precision=precision,
            process_group=process_group,
        )


def runs_of(groups: list[Group], members: list[int]) -> Iterator[tuple[Group, list[int]]]:
    """Cut indices of matrices where one parameter group follows another."""
    for _, run in groupby(members, key=lambda i: id(groups[i])):
        indices = list(run)
        yield groups[indices[0]], indices
