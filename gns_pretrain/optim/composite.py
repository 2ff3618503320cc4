"""Several rules as one optimizer: a matrix rule inside the blocks, AdamW for everything else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gns_pretrain.optim.adamw import AdamWPart, adamw_over
from gns_pretrain.optim.groups import ALL_KINDS, BLOCK_MATRICES, decay_groups


class Composite(torch.optim.Optimizer):
    """Optimizers over different parameters of a model, seen as one.

    Groups and state are the parts' own, in the parts' order, so that the learning rate, saving and
    loading see one optimizer over all parameters.

    Args:
        parts: freshly built, over parameters that do not overlap.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Let each part work on its stretch of the groups and on the one state."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part.

        Args:
            closure: computes the gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state of all parts."""
        super().load_state_dict(state_dict)
        self._share()


def with_adamw(
    model: nn.Module,
    rule: torch.optim.Optimizer,
    settings: AdamWPart,
    *,
    decay_matrices_only: bool,
) -> Composite:
    """A rule over the block matrices, joined by AdamW over embedding, output and norms.

    Args:
        model: laid over ranks.
        rule: built over `block_matrices(model)`.
        settings: of AdamW.
        decay_matrices_only: whether the norms' weights go without decay.
    """
    groups = decay_groups(
        model,
        weight_decay=settings.weight_decay,
        matrices_only=decay_matrices_only,
        kinds=ALL_KINDS - BLOCK_MATRICES,
    )
    return Composite([rule, adamw_over(groups, settings)] if groups else [rule])
