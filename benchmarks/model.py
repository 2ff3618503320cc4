"""Speed of a training step against transformers' LlamaForCausalLM of the same shape and weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    ModelCommand,
    Pairs,
    Row,
    compute_dtype,
    device_name,
    paired,
    this_process,
)
from gns_pretrain.fields import About, at_least
from gns_pretrain.model.config import count_parameters
from gns_pretrain.model.huggingface import ExportedText, to_transformers
from gns_pretrain.model.llama import Llama


@dataclass
class Model(ModelCommand):
    """A training step against transformers' LlamaForCausalLM."""

    batch_size: Annotated[int, at_least(1), About("sequences in a step")] = 8
    sequence_length: Annotated[int, at_least(1), About("tokens")] = 256
    pairs: Pairs = 20
    compile: Annotated[bool, About("compile the blocks of both")] = False

    def run(self) -> Iterator[Row]:
        """Yield one row: forward, backward and AdamW of both models, alternating.

        On a GPU both compute in bfloat16 from float32 weights. Compiled, each model has its blocks
        compiled one by one. `ratio` is ours / transformers'.
        """
        world, shape = this_process(), self.shape()
        device = world.device
        with device:
            ours = Llama(shape)
        ours.init_weights(seed=0)
        ours.compute_dtype = compute_dtype(device)
        positions = ExportedText(max_positions=self.sequence_length)
        theirs = to_transformers(ours, positions, "the comparison needs transformers").train()
        if self.compile:
            ours.compile_blocks()
            for block in theirs.model.layers:
                block.compile()
        text = torch.randint(
            shape.known_vocab_size,
            (self.batch_size, self.sequence_length + 1),
            generator=torch.Generator().manual_seed(0),
        ).to(device)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

        # shift_labels: the targets as they are; labels alone would lose the last position.
        inputs = {"input_ids": tokens, "labels": targets, "shift_labels": targets}

        def our_loss() -> Tensor:
            return ours(tokens, targets)

        def their_loss() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
                return theirs(**inputs, use_cache=False).loss

        difference = (our_loss() - their_loss()).item()
        timings = paired(
            {"ours": adamw_step(ours, our_loss), "transformers": adamw_step(theirs, their_loss)},
            self.pairs,
            world,
        )
        yield {
            "measured": "model",
            "model": shape.name,
            "vocab_size": shape.known_vocab_size,
            "parameters": count_parameters(shape).total,
            "device": device_name(device),
            "dtype": str(compute_dtype(device)).removeprefix("torch."),
            "compiled": self.compile,
            **self.options("batch_size", "sequence_length", "pairs"),
            "seconds": round(timings.median("ours"), 5),
            "transformers_seconds": round(timings.median("transformers"), 5),
            **timings.ratio("ratio", "ours", "transformers"),
            "tokens_per_second": round(tokens.numel() / timings.median("ours")),
            "transformers_tokens_per_second": round(
                tokens.numel() / timings.median("transformers")
            ),
            "loss_difference": difference,
        }


def adamw_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that takes one training step with torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
