"""The loop of plain_loop.py, measuring its noise scale every ten steps."""

import torch
from torch import nn
from torch.nn import functional as F

from gns_pretrain import NoiseMeter

BUDGET, BATCH, MICRO_BATCH, LR = 3200, 32, 4, 1e-3  # samples
ACCUMULATION = BATCH // MICRO_BATCH

torch.manual_seed(0)
teacher = nn.Linear(20, 5)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
meter = NoiseMeter(model, geometries=["manhattan"], every_steps=10)


def next_micro_batch():
    """Return inputs and labels."""
    x = torch.randn(MICRO_BATCH, 20)
    return x, teacher(x).argmax(1)


for step in range(BUDGET // BATCH):
    with meter.step(step + 1):
        for _ in range(ACCUMULATION):
            x, y = next_micro_batch()
            with meter.sample():
                loss = F.cross_entropy(model(x), y)
                (loss / ACCUMULATION).backward()
    for reading in meter.read(batch_size=BATCH):
        print(f"step {step + 1}: noise scale {reading.total.noise_scale:.1f} samples")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = LR * (1 - step * BATCH / BUDGET)
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
