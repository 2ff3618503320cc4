"""What our models and their settings have in common."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings

KIND = "kind"  # of model.json


@dataclass
class ModelSettings(Settings):
    """Base of each model's settings."""

    section: ClassVar[str] = "model"
    kind: ClassVar[str] = ""  # names the schema in conf/model and in a checkpoint's model.json

    name: str  # appears in records and tables

    @property
    def tensor_parallel_widths(self) -> Mapping[str, int]:
        """Settings that tensor parallelism divides over ranks; empty where it splits nothing."""
        return {}

    @property
    def relative_width(self) -> float:
        """Width by which learning rates go; 1 where they do not."""
        return 1.0


def check_heads(dim: int, num_heads: int) -> None:
    """Raise InputError unless the heads divide the width."""
    if dim % num_heads:
        raise InputError(
            f"model.num_heads={num_heads} does not divide model.dim={dim}; use a divisor of {dim}"
        )


def described(settings: ModelSettings) -> dict[str, Any]:
    """Settings as a checkpoint holds them; without a kind they are a Llama's."""
    kind = {} if settings.kind == "llama" else {KIND: settings.kind}
    return kind | asdict(settings)


class OurModel(nn.Module):
    """Base of the models that runs train: called with inputs alone they return logits.

    Called with a micro-batch, inputs and targets, they return its mean loss ([], float32, nats).
    """

    config: ModelSettings
    compute_dtype: torch.dtype = torch.float32  # of the copies of the weights in a forward pass
    layers: nn.ModuleList  # blocks, which are sharded and compiled one by one
    blocks_compiled: bool = False

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks, one by one; before sharding."""
        for block in self.layers:
            block.compile(backend=backend)
        self.blocks_compiled = True
