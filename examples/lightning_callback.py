"""A callback that measures the noise scale of Lightning's Trainer, and a tiny run of it.

python examples/lightning_callback.py    (needs lightning; on several devices: DDP)
"""

from contextlib import ExitStack
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gns_pretrain import NoiseMeter


class NoiseScaleCallback(lightning.Callback):
    """Logs noise scales as `noise_scale/GEOMETRY`; each micro-batch of a device is a sample.

    For automatic optimization. Lightning clips after `on_before_optimizer_step`, where this reads.

    Args:
        micro_batch_size: samples that `training_step` takes.
        options: of `NoiseMeter`.
    """

    def __init__(self, micro_batch_size: int, **options: Any) -> None:
        self.micro_batch_size, self.options = micro_batch_size, options
        self.step, self.sample = ExitStack(), ExitStack()
        self.is_first = True  # micro-batch of its optimizer step

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Build the meter of the model as the strategy has wrapped it."""
        self.meter = NoiseMeter(trainer.strategy.model, **self.options)

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Before each micro-batch."""
        if self.is_first:
            self.step.enter_context(self.meter.step(trainer.global_step + 1))
        self.is_first = False
        self.sample.enter_context(self.meter.sample())

    def on_after_backward(self, *_: Any) -> None:
        """After each micro-batch."""
        self.sample.close()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any
    ) -> None:
        """After the last micro-batch of a step, before clipping."""
        self.step.close()
        self.is_first = True
        samples = trainer.accumulate_grad_batches * trainer.world_size
        for reading in self.meter.read(batch_size=samples * self.micro_batch_size):
            name = f"noise_scale/{reading.total.geometry}"
            module.log(name, reading.total.noise_scale, rank_zero_only=True)


class Classifier(lightning.LightningModule):
    """Two layers and AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    """Train and print what was logged."""
    lightning.seed_everything(0)
    x = torch.randn(256, 12)
    data = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=4)
    callback = NoiseScaleCallback(4, geometries=["euclidean", "nuclear"], every_steps=4)
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=8,
        gradient_clip_val=1.0,
        callbacks=[callback],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), data)
    for name, value in trainer.callback_metrics.items():
        print(f"{name} {value.item():.2f}")


if __name__ == "__main__":
    main()
