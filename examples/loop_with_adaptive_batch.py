"""The loop of plain_loop.py, whose batch and learning rate follow the noise scale."""

import torch
from torch import nn
from torch.nn import functional as F

from gns_pretrain import AdaptiveBatchSize, NoiseMeter

BUDGET, BATCH, MICRO_BATCH, LR = 3200, 32, 4, 1e-3  # samples
ACCUMULATION = BATCH // MICRO_BATCH

torch.manual_seed(0)
teacher = nn.Linear(20, 5)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
meter = NoiseMeter(model, geometries=["manhattan"], every_steps=10)
adaptive = AdaptiveBatchSize(batch_size=BATCH, micro_batch_size=MICRO_BATCH, total_samples=BUDGET)


def next_micro_batch():
    """Return inputs and labels."""
    x = torch.randn(MICRO_BATCH, 20)
    return x, teacher(x).argmax(1)


while adaptive.samples < BUDGET:
    with meter.step(adaptive.steps + 1):
        for _ in range(adaptive.accumulation):
            x, y = next_micro_batch()
            with meter.sample():
                loss = F.cross_entropy(model(x), y)
                (loss / adaptive.accumulation).backward()
    readings = meter.read(batch_size=adaptive.batch_size)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = LR * adaptive.lr_multiplier * (1 - adaptive.samples / BUDGET)
    optimizer.step()
    optimizer.zero_grad()
    adaptive.step(readings)
print(f"loss {loss.item():.3f}, last batch {adaptive.batch_size}")
