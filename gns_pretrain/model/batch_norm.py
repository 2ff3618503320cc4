"""Batch normalization whose running statistics do not depend on how a step is split over ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOMENTUM = 0.1  # of the running statistics, a step; torch's default
EPS = 1e-5  # added to the variance; torch's default


class BatchNorm(nn.Module):
    """[n, C, H, W] to the same shape; each micro-batch by its own mean and variance, as torch's.

    torch's running statistics take every micro-batch of a rank in turn, so they depend on the
    number of ranks and on accumulation. These are updated once a step, from the mean over all its
    micro-batches (`update`); in between their sum is kept. One micro-batch on one rank is torch.
    """

    running_mean: Tensor  # [C]
    running_var: Tensor  # [C], unbiased
    # [2 C + 1]; means and variances summed over micro-batches since the last update, their number
    pending: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("pending", torch.zeros(2 * channels + 1), persistent=False)

    def reset(self) -> None:
        """Set weights and statistics to those of a new module."""
        for zero in (self.bias.data, self.running_mean, self.pending):
            zero.zero_()
        for one in (self.weight.data, self.running_var):
            one.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of x in training, by the running ones in evaluation."""
        # FSDP2's copies may be bfloat16; the statistics are not.
        weight, bias = (w.to(self.running_mean.dtype) for w in (self.weight, self.bias))
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, eps=EPS)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=EPS)
        with torch.no_grad():
            self.pending += torch.cat([mean, var, mean.new_ones(1)])
        return y

    @torch.no_grad()
    def update(self, total: Tensor) -> None:
        """Move the running statistics towards the mean of a step's micro-batches.

        Args:
            total: `pending`, summed over the ranks; it begins anew.
        """
        mean, var = (total[:-1] / total[-1]).chunk(2)
        self.running_mean.lerp_(mean, MOMENTUM)
        self.running_var.lerp_(var, MOMENTUM)
