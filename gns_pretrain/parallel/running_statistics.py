"""Running statistics of batch normalization, once a step and the same on every rank."""

import torch
import torch.distributed as dist
from torch import nn

from gns_pretrain.model.batch_norm import BatchNorm


def update_running_statistics(model: nn.Module, *, keep: bool = True) -> None:
    """Update the running statistics from the micro-batches of a step on all ranks.

    One all-reduce; none for a model without batch normalization. All ranks call it after the step's
    last forward pass, with the same `keep`.

    Args:
        keep: False forgets the step's statistics, for a step that is left out.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if norms and keep:
        totals = torch.cat([norm.pending for norm in norms])
        if dist.is_initialized():
            dist.all_reduce(totals)
        for norm, total in zip(norms, totals.split([len(n.pending) for n in norms]), strict=True):
            norm.update(total)
    for norm in norms:
        norm.pending.zero_()
