"""A callback that measures the noise scale of transformers' Trainer, and a tiny run of it.

python examples/hf_trainer_callback.py    (needs accelerate; also under torchrun: DDP)
"""

import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from gns_pretrain import InputError, NoiseMeter


class NoiseScaleCallback(TrainerCallback):
    """Logs noise scales as `noise_scale/GEOMETRY`; each micro-batch of a device is a sample.

    The Trainer would clip before any callback sees the gradient, so it must not (max_grad_norm=0),
    and this clips after reading.

        trainer.add_callback(NoiseScaleCallback(trainer, max_grad_norm=1.0))

    Args:
        options: of `NoiseMeter`.
    """

    def __init__(self, trainer: Trainer, *, max_grad_norm: float = 1.0, **options: Any) -> None:
        if trainer.args.max_grad_norm:
            raise InputError(
                f"TrainingArguments.max_grad_norm={trainer.args.max_grad_norm} clips gradients "
                "before they can be read; use 0, and max_grad_norm of NoiseScaleCallback"
            )
        self.trainer, self.max_grad_norm, self.options = trainer, max_grad_norm, options
        self.step, self.sample = ExitStack(), ExitStack()

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Build the meter of the model as the Trainer has wrapped it."""
        self.meter = NoiseMeter(self.trainer.model_wrapped, **self.options)
        devices = self.trainer.accelerator.num_processes
        per_sample = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.batch_size = per_sample * devices

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        self.step.enter_context(self.meter.step(state.global_step + 1))
        self.sample.enter_context(self.meter.sample())

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """After each micro-batch but the last."""
        self.sample.close()
        self.sample.enter_context(self.meter.sample())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the last micro-batch."""
        self.sample.close()
        self.step.close()
        readings = self.meter.read(batch_size=self.batch_size)
        if readings:
            totals = [reading.total for reading in readings]
            self.trainer.log({f"noise_scale/{t.geometry}": t.noise_scale for t in totals})
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), self.max_grad_norm)


def main() -> None:
    """Train GPT-2 on sequences of one repeated token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    rows = [{"input_ids": [i % 32] * 8, "labels": [i % 32] * 8} for i in range(256)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=20,
            max_grad_norm=0.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows)
        trainer.add_callback(
            NoiseScaleCallback(trainer, geometries=["euclidean", "manhattan"], every_steps=10)
        )
        trainer.train()


if __name__ == "__main__":
    main()
