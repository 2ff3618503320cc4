"""Which weights the gradient tap listens to, where autograd reaches them, and who owns them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gns_pretrain.distributed.matrix_exchange import balanced_owners
from gns_pretrain.distributed.mesh import World
from gns_pretrain.distributed.sharding import unwrapped
from gns_pretrain.model.llama import Kind, parameter_kinds


@dataclass(frozen=True)
class TappedWeight:
    """A trainable weight and where its gradients are seen."""

    name: str
    kind: Kind
    weight: nn.Parameter  # what the optimizer updates; its .grad is the mean gradient
    seen: Tensor  # what autograd reaches: the weight itself, or FSDP2's unsharded copy
    owner: int | None  # rank that owns its Gram; None for what has none
    block: str  # weights of one block travel together

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight."""
        return self.weight.shape


def tapped_weights(model: nn.Module, world: World, *, all_2d: bool) -> list[TappedWeight]:
    """Every trainable weight, with what autograd reaches and, for matrices, an owner.

    Args:
        model: laid over ranks by `parallelize`.
        world: its ranks.
        all_2d: give embedding and output owners too, not the blocks' matrices alone.
    """
    llama = unwrapped(model)
    kinds = parameter_kinds(llama)
    seen = unsharded_weights(llama)
    trainable = [(n, p) for n, p in llama.named_parameters() if p.requires_grad]
    matrices = [name for name, _ in trainable if has_gram(kinds[name], all_2d=all_2d)]
    costs = [float(min(llama.get_parameter(name).shape)) ** 3 for name in matrices]
    owners = dict(zip(matrices, balanced_owners(costs, world.num_ranks), strict=True))
    return [
        TappedWeight(
            name=name,
            kind=kinds[name],
            weight=weight,
            seen=seen[name],
            owner=owners.get(name),
            block=block_of(name),
        )
        for name, weight in trainable
    ]


def has_gram(kind: Kind, *, all_2d: bool) -> bool:
    """Whether the nuclear geometry looks at weights of this kind."""
    if kind in (Kind.ATTENTION, Kind.FEED_FORWARD):
        return True
    return all_2d and kind in (Kind.EMBEDDING, Kind.OUTPUT)


def block_of(name: str) -> str:
    """Weights whose gradients come close together: `layers.3`, `embedding`, `norm` or `output`.

    FSDP2 keeps the last three in one group; here the output's gradient, the first of all, would
    wait for the embedding's, the last.
    """
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def unsharded_weights(llama: nn.Module) -> dict[str, Tensor]:
    """What autograd reaches for each weight: FSDP2 swaps it in for the forward and backward pass.

    These tensors stay the same objects when they are sharded and unsharded again (an
    implementation fact of torch 2.11 to 2.13, held by a test), so one look at the start serves
    every later step.
    """
    weights: dict[str, Tensor] = {
        name: weight for name, weight in llama.named_parameters() if not isinstance(weight, DTensor)
    }
    for module in llama.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            weights |= {
                name: weight
                for name, weight in llama.named_parameters()
                if not isinstance(weight, DTensor)
            }
            module.reshard()
    return weights
