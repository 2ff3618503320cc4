"""The loss of hidden states and output matrix with its gradients, against other ways to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import (
    ON_GPU,
    ModelCommand,
    ModelName,
    Pairs,
    Row,
    compute_dtype,
    device_name,
    paired,
    this_process,
)
from gns_pretrain.fields import About, at_least
from gns_pretrain.model.loss import compiled_logit_gradients_, next_token_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SLICE_TOKENS = 1024  # of the reference in float64


@dataclass
class LossBenchmark(ModelCommand):
    """Time, memory and error of the loss: ours, plain, and Liger's and cut-cross-entropy's."""

    model: ModelName = "llama3_160m" if ON_GPU else "tiny"
    tokens: Annotated[int, at_least(1), About("of a micro-batch")] = 16384 if ON_GPU else 1024
    pairs: Pairs = 5

    def run(self) -> Iterator[Row]:
        """Yield a row for each way; one whose package is missing or that fails says so."""
        world, shape = this_process(), self.shape()
        dtype, vocab_size = compute_dtype(world.device), shape.known_vocab_size
        generator = torch.Generator(world.device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=world.device)
        hidden = draw(self.tokens, shape.dim).to(dtype).requires_grad_()
        # As in a model that has learned something: logits of a few units.
        weight = (draw(vocab_size, shape.dim) * 2 * shape.dim**-0.5).to(dtype).requires_grad_()
        targets = torch.randint(
            vocab_size, (self.tokens,), generator=generator, device=world.device
        )
        expected = reference(hidden, weight, targets)
        for name, loss in ways().items():
            row: Row = {
                "measured": "loss",
                "way": name,
                "model": shape.name,
                "vocab_size": vocab_size,
                "tokens": self.tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device_name(world.device),
            }
            if isinstance(loss, str):
                yield row | {"skipped": loss}
                continue
            step = partial(loss_and_gradients, loss, hidden, weight, targets)
            try:
                found = step()
                seconds = paired({"loss": step, "again": step}, self.pairs, world).median("loss")
            except Exception as error:  # another package's kernel, whatever it raises
                yield row | {"skipped": f"{type(error).__name__}: {error}"[:200]}
                continue
            names = ("loss", "hidden_gradient", "weight_gradient")
            errors = [
                ((ours - truth).norm() / truth.norm()).item()
                for ours, truth in zip(found, expected, strict=True)
            ]
            row |= {f"{n}_error": e for n, e in zip(names, errors, strict=True)}
            del found
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                row["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            yield row | {"seconds": round(seconds, 6), "pairs": self.pairs}


def ways() -> dict[str, Loss | str]:
    """Each way by its name; a line for one that cannot be tried."""
    return {
        "ours": partial(next_token_loss, logit_gradients=compiled_logit_gradients_()),
        "ours, eager": next_token_loss,
        "plain": lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t),
        "liger": liger_loss(),
        "cut_cross_entropy": cut_loss(),
    }


def liger_loss() -> Loss | str:
    if find_spec("liger_kernel") is None or not ON_GPU:
        return "liger_kernel is not installed, or there is no GPU"
    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = module.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32
        )
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    return loss


def cut_loss() -> Loss | str:
    if find_spec("cut_cross_entropy") is None or not ON_GPU:
        return "cut_cross_entropy is not installed, or there is no GPU"
    loss: Loss = import_module("cut_cross_entropy").linear_cross_entropy
    return loss


def loss_and_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and its gradients to the hidden states and the output matrix."""
    value = loss(hidden, weight, targets)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """`loss_and_gradients` in float64, a slice of the tokens at a time."""
    wide_weight = weight.detach().double().requires_grad_()
    loss, gradients = hidden.new_zeros((), dtype=torch.float64), []
    for rows, labels in zip(hidden.split(SLICE_TOKENS), targets.split(SLICE_TOKENS), strict=True):
        wide = rows.detach().double().requires_grad_()
        part = F.cross_entropy(F.linear(wide, wide_weight), labels, reduction="sum") / len(hidden)
        part.backward()
        loss += part.detach()
        assert wide.grad is not None
        gradients.append(wide.grad)
    assert wide_weight.grad is not None
    return [loss, torch.cat(gradients), wide_weight.grad]
