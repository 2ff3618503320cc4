"""A ConvNet on one process: Muon for convolutions, AdamW for the rest, the nuclear noise scale.

python examples/convnet_muon.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain import CombinedOptimizer, Muon, NoiseMeter, split_parameters

NUM_STEPS, BATCH, MICRO_BATCH = 40, 64, 8  # images
CLASSES, WIDTH = 10, 16


def images(count: int, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Return noisy images of random classes, [count, 3, WIDTH, WIDTH], and their labels."""
    labels = torch.randint(CLASSES, (count,))
    return patterns[labels] + 2 * torch.randn(count, 3, WIDTH, WIDTH), labels


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Return convolution, normalization and activation, at half the resolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),  # by the statistics of a micro-batch: it is the sample
        nn.ReLU(),
    )


def main() -> None:
    """Train and print the noise scale."""
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, 3, WIDTH, WIDTH)
    model = nn.Sequential(
        convolution(3, 16),
        convolution(16, 32),
        convolution(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    # A convolution's matrix is [out, in * height * width]; the last Linear is the head, AdamW's.
    matrices, others = split_parameters(model)
    optimizer = CombinedOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3)])
    meter = NoiseMeter(model, geometries=["nuclear"], estimates=["plug_in"], every_steps=10)

    for step in range(1, NUM_STEPS + 1):
        inputs, labels = images(BATCH, patterns)
        micro_batches = list(zip(inputs.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True))
        with meter.step(step):
            for x, y in micro_batches:
                with meter.sample():
                    loss = F.cross_entropy(model(x), y)
                    (loss / len(micro_batches)).backward()
        for reading in meter.read(batch_size=BATCH):
            scale = reading.total.noise_scale
            print(f"step {step}: loss {loss.item():.3f}, noise scale {scale:.1f} images")
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
