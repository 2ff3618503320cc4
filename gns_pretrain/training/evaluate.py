"""Validation loss on a fixed set of sequences, the same whatever the layout."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from gns_pretrain.fields import Settings, at_least
from gns_pretrain.parallel.collectives import sum_over_ranks
from gns_pretrain.parallel.mesh import World


@dataclass
class EvaluationSettings(Settings):
    """When and on what the validation loss is taken; also at step 1 and at the end."""

    section: ClassVar[str] = "evaluation"

    every_tokens: Annotated[int, at_least(1)] = 400_000  # tokens between evaluations
    # the first so many of the validation split, of a mixture by its weights
    num_sequences: Annotated[int, at_least(1)] = 64


@dataclass(frozen=True)
class ValidationSet:
    """The sequences of one source; the validation loss is the weighted mean over the sources."""

    name: str
    weight: float  # of all sources together 1
    sequences: Tensor  # int64 [n, L + 1] on the device, the same on every rank


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor, *, chunk: int, world: World) -> float:
    """Mean negative log-likelihood per token, in nats; data-parallel ranks take chunks in turn.

    Args:
        sequences: int64 [n, L + 1] on the device, the same on every rank.
        chunk: sequences in a forward pass.
    """
    chunks = list(sequences.split(chunk))
    total = torch.zeros(2, dtype=torch.float64, device=sequences.device)
    for start in range(0, len(chunks), world.num_data_ranks):
        index = start + world.data_rank
        # A rank without a chunk of its own repeats another: sharded weights need all ranks.
        local = chunks[index] if index < len(chunks) else chunks[start]
        loss = model(local[:, :-1], local[:, 1:])
        if index < len(chunks):
            total[0] += loss.double() * len(local)
            total[1] += len(local)
    loss_sum, count = sum_over_ranks(total, world).tolist()
    return loss_sum / count
