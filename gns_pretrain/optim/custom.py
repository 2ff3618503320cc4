"""Any other optimizer, by its class path: torch.optim.*, or one of an installed library."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gns_pretrain.errors import InputError, one_line
from gns_pretrain.fields import one_of
from gns_pretrain.model.roles import named_trainable
from gns_pretrain.optim.adamw import AdamWPart, with_adamw
from gns_pretrain.optim.averaging import two_faced
from gns_pretrain.optim.base import Group, OptimizerSettings, WeightDecay
from gns_pretrain.optim.combined import split_parameters


@dataclass
class CustomSettings(OptimizerSettings):
    """An optimizer named by its class."""

    name: str = "custom"
    weight_decay: WeightDecay = 0.0  # handed to the class, which may couple it with the gradient
    class_path: str = "???"  # such as torch.optim.NAdam
    kwargs: Any = None  # a mapping, for the class beside lr and weight decay; null: nothing
    # block_matrices: with AdamW for the rest
    parameters: Annotated[str, one_of("all", "block_matrices")] = "all"
    adamw: AdamWPart = field(default_factory=AdamWPart)  # for what the class does not take

    def __post_init__(self) -> None:
        """Try the class on small weights, so that a mistake shows before anything starts."""
        super().__post_init__()
        # Not typed as a mapping: Hydra would then refuse every name that is not there already.
        if not (self.kwargs is None or isinstance(self.kwargs, dict)):
            raise InputError(
                f"optimizer.kwargs={self.kwargs} is not a mapping; write optimizer.kwargs="
                "'{momentum_decay: 0.004}'"
            )
        for name, value in (self.kwargs or {}).items():
            if name in ("lr", "weight_decay"):
                raise InputError(
                    f"optimizer.kwargs.{name} is a setting of its own; use optimizer.{name}={value}"
                )
        if self.weight_decay_timescale is not None:
            raise InputError(
                f"optimizer.weight_decay_timescale={self.weight_decay_timescale} is of a decoupled "
                f"weight decay, and {self.class_path} may couple its own with the gradient; use "
                "optimizer.weight_decay"
            )
        optimizer = self._trial_step()
        if self.tie_to_tokens and two_faced(optimizer):
            raise InputError(
                "optimizer.tie_to_tokens=true changes momenta and betas with the batch, which say "
                f"between which weights {self.class_path} takes gradients; use "
                "optimizer.tie_to_tokens=false, or averaging=gpa"
            )
        if self.tie_to_tokens and optimizer.param_groups[0].get("momentum", 0):
            raise InputError(
                "optimizer.tie_to_tokens=true needs to know whether a momentum is an average or a "
                f"sum, which {self.class_path} does not say; use optimizer.tie_to_tokens=false, or "
                "optimizer=sgd_momentum, signum or muon"
            )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the named optimizer over all trainable parameters or over the block matrices.

        Raises:
            InputError: it cannot step along weights that are sharded as the model's are.
        """
        self._try_sharded(model)
        if self.parameters == "all":
            return self._instantiate(self.parameter_groups(model))
        groups, others = split_parameters(model)
        matrices = [group | {"weight_decay": self.weight_decay} for group in groups]
        return with_adamw(
            self._instantiate(matrices),
            others,
            self.adamw,
            decay_matrices_only=self.decay_matrices_only,
        )

    def _try_sharded(self, model: nn.Module) -> None:
        """Try the class on small weights that are sharded as a model's are, if any are."""
        weights = [weight for _, weight in named_trainable(model) if isinstance(weight, DTensor)]
        like = {weight.ndim: weight for weight in weights}
        if not {1, 2} <= like.keys():
            return

        def sharded(*shape: int) -> DTensor:
            weight = like[len(shape)]
            local = torch.zeros(shape, device=weight.device)
            return DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False)

        try:
            self._trial_step(sharded)
        except InputError as problem:
            raise InputError(
                f"optimizer.class_path={self.class_path} cannot step along sharded weights: "
                f"{one_line(problem.__cause__ or problem)}; use parallel=ddp, or a class that "
                "takes DTensors",
                on_all_ranks=True,
            ) from problem

    def _trial_step(self, zeros: Callable[..., Tensor] = torch.zeros) -> torch.optim.Optimizer:
        """Step once over small weights, grouped as a model's; InputError if that fails."""
        matrix, vector = nn.Parameter(zeros(2, 2)), nn.Parameter(zeros(2))
        matrices: Group = {"params": [matrix], "weight_decay": self.weight_decay}
        if self.parameters == "block_matrices":
            return self._after_a_step([matrices])
        groups = [matrices, {"params": [vector], "weight_decay": 0.0}]
        if not self.decay_matrices_only:
            groups = [{"params": [matrix, vector], "weight_decay": self.weight_decay}]
        try:
            return self._after_a_step(groups)
        except InputError as problem:
            try:
                self._after_a_step([matrices])
            except InputError:
                raise problem from None
            raise InputError(
                f"optimizer.parameters=all hands vectors to {self.class_path} too: "
                f"{one_line(problem.__cause__ or problem)}; use optimizer.parameters="
                "block_matrices, with AdamW for the rest"
            ) from problem

    def _after_a_step(self, groups: list[Group]) -> torch.optim.Optimizer:
        optimizer = self._instantiate(groups)
        for parameter in (parameter for group in groups for parameter in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        try:
            for face in two_faced(optimizer):
                face.train()
            optimizer.step()
        except Exception as error:  # somebody else's class may raise anything
            raise InputError(
                f"optimizer.class_path={self.class_path} cannot take a step: {one_line(error)}; "
                "name a class that steps along dense gradients, and on a CPU"
            ) from error
        return optimizer

    def _instantiate(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Import the class and build it over parameter groups; InputError if that fails."""
        try:
            optimizer_class: Any = pkgutil.resolve_name(self.class_path)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"optimizer.class_path={self.class_path} cannot be imported ({error}); use a path "
                "such as torch.optim.NAdam, and install its library first"
            ) from error
        if torch.optim.Optimizer not in getattr(optimizer_class, "__mro__", ()):
            raise InputError(
                f"optimizer.class_path={self.class_path} is not a torch.optim.Optimizer; "
                "name a subclass of it"
            )
        try:
            optimizer = optimizer_class(groups, lr=self.lr, **(self.kwargs or {}))
        except Exception as error:  # somebody else's class may raise anything
            raise InputError(
                f"optimizer.kwargs={self.kwargs} with optimizer.lr={self.lr} is not what "
                f"{self.class_path} takes: {one_line(error)}; see its documentation"
            ) from error
        if self.weight_decay > 0 and "weight_decay" not in optimizer.defaults:
            raise InputError(
                f"optimizer.weight_decay={self.weight_decay}, but {self.class_path} has no weight "
                "decay; use optimizer.weight_decay=0"
            )
        return optimizer
