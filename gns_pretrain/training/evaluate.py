"""Means over a validation split, the same whatever the layout."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from gns_pretrain.fields import Settings, at_least, positive
from gns_pretrain.parallel.collectives import sum_over_ranks
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.workload import MicroBatch


@dataclass
class EvaluationSettings(Settings):
    """When and on what the validation loss is taken; also at step 1 and at the end."""

    section: ClassVar[str] = "evaluation"

    every_tokens: Annotated[int, at_least(1)] = 400_000  # tokens between evaluations, of text
    # the first so many of the validation split, of a mixture by its weights; of text
    num_sequences: Annotated[int, at_least(1)] = 64
    every_epochs: Annotated[float, positive()] = 1.0  # between evaluations, of images
    # of the validation split, evenly spaced, at most; null: all; of images
    num_images: Annotated[int | None, at_least(1)] = None


@torch.no_grad()
def mean_over(
    chunks: Iterable[MicroBatch], measure: Callable[[MicroBatch], Tensor], *, world: World
) -> list[float]:
    """Means over the samples of all chunks, which data-parallel ranks take in turn.

    Args:
        chunks: on the device, the same on every rank.
        measure: means over the samples of a chunk, [k].

    Returns:
        The k means, on every rank.
    """
    chunks = list(chunks)
    total = torch.zeros(1, dtype=torch.float64, device=world.device)
    for start in range(0, len(chunks), world.num_data_ranks):
        index = start + world.data_rank
        # A rank without a chunk of its own repeats another: sharded weights need all ranks.
        local = chunks[index] if index < len(chunks) else chunks[start]
        means = measure(local).double()
        count = len(local[0]) if index < len(chunks) else 0
        total = total + torch.cat([means * count, means.new_tensor([count])])
    *sums, count = sum_over_ranks(total, world).tolist()
    return [each / count for each in sums]
