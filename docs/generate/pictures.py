"""Draw the pictures of docs/concepts from gradients of a small model, a minute on two cores.

python docs/generate/pictures.py

The model is that of scale=demo on the embedded text, after 100 steps of AdamW. Everything shown is
computed from gradients of batches, but for theta.png, which shows equations and a table of
docs/results.md.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter
from omegaconf import OmegaConf
from torch import Tensor

from gns_pretrain import NoiseMeter, Role, parameter_roles
from gns_pretrain.config.register import CONFIG_FOLDER
from gns_pretrain.data.batches import Batches
from gns_pretrain.data.settings import DataSettings, open_splits
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.results.figures import COLORS, STYLE

DOCS = Path(__file__).parents[1]
LENGTH = 64  # tokens of a sequence
SIZES = (1, 4, 16, 64, 256)  # sequences of a batch whose gradient is compared
GROUPS = 8  # batches of each size
FIRST = 1600  # sequence that the model was not trained on
ALL = 2048  # sequences whose mean gradient stands for the true one
MICRO_BATCH = 16  # sequences
READ_WITH = (8, 16, 32, 64, 128, 256, 512, 1024)  # sequences of a measured batch
READINGS = 3  # of each size
LABELS = {"euclidean": "Euclidean", "manhattan": "Manhattan", "nuclear": "nuclear"}
GREY = "#777777"


def main() -> None:
    torch.manual_seed(0)
    text = DataSettings(path="embedded", sequence_length=LENGTH, embedded_vocab_size=2048)
    batches = Batches(
        open_splits(text)[0], sequence_length=LENGTH, seed=0, device=torch.device("cpu")
    )
    shape: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / "model" / "demo.yaml"))
    del shape["defaults"]
    model = Llama(LlamaConfig(**shape, vocab_size=2048))
    model.init_weights(seed=0)
    train(model, batches)
    errors, reference = errors_of_batches(model, batches)
    scales = true_noise_scales(model, batches)
    with plt.rc_context(STYLE):
        for geometry in LABELS:
            draw_geometry(geometry, model, errors, reference, scales[geometry])
        draw_estimates(model, batches)
        draw_theta()
    batches.close()


def train(model: Llama, batches: Batches) -> None:
    """Take 100 steps of 16 sequences, the first of the run's order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(FIRST // 16):
        for tokens in batches.micro_batches(step * 16, batch_size=16, micro_batch_size=16):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(
    model: Llama, batches: Batches, size: int, count: int, first: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the mean gradient of each of `count` batches, weight by weight."""
    for number in range(count):
        model.zero_grad()
        cursor, micro = first + number * size, min(size, MICRO_BATCH)
        for tokens in batches.micro_batches(cursor, batch_size=size, micro_batch_size=micro):
            (model(tokens[:, :-1], tokens[:, 1:]) * micro / size).backward()
        weights = model.named_parameters()
        yield {name: weight.grad for name, weight in weights if weight.grad is not None}


def dual_norms(model: Llama, gradient: dict[str, Tensor]) -> dict[str, float]:
    """Length of a gradient, or of its error, in each geometry's dual norm."""
    flat = torch.cat([each.flatten() for each in gradient.values()]).double()
    roles = parameter_roles(model)
    matrices = [each for name, each in gradient.items() if roles[name] is Role.MATRIX]
    return {
        "euclidean": flat.norm().item(),
        "manhattan": flat.abs().sum().item(),
        "nuclear": sum(torch.linalg.svdvals(each.double()).sum().item() for each in matrices),
    }


def errors_of_batches(
    model: Llama, batches: Batches
) -> tuple[dict[int, dict[str, float]], dict[str, Tensor]]:
    """Mean error of a batch's gradient by its size and geometry, and the mean of all gradients."""
    largest = SIZES[-1]
    kept = {size: list(gradients(model, batches, size, GROUPS, FIRST + ALL)) for size in SIZES[:-1]}
    kept[largest] = list(gradients(model, batches, largest, ALL // largest, FIRST))
    reference = {
        name: torch.stack([one[name] for one in kept[largest]]).mean(0) for name in kept[largest][0]
    }
    errors: dict[int, dict[str, float]] = {}
    for size, found in kept.items():
        # The largest batches are part of the reference, which their error has to leave out.
        part = size / ALL if size == largest else 0.0
        norms = [
            dual_norms(
                model, {name: (one[name] - mean) / (1 - part) for name, mean in reference.items()}
            )
            for one in found
        ]
        errors[size] = {name: sum(n[name] for n in norms) / len(norms) for name in LABELS}
    return errors, reference


def true_noise_scales(model: Llama, batches: Batches) -> dict[str, float]:
    """The noise scale from 128 samples of 16 sequences, by geometry."""
    meter = NoiseMeter(model, geometries=list(LABELS))
    model.zero_grad()
    with meter.measure():
        found = batches.micro_batches(FIRST, batch_size=ALL, micro_batch_size=MICRO_BATCH)
        for tokens in found:
            with meter.sample():
                loss = model(tokens[:, :-1], tokens[:, 1:])
                (loss * MICRO_BATCH / ALL).backward()
    readings = meter.read(batch_size=ALL)
    return {each.total.geometry: each.total.noise_scale or 0.0 for each in readings}


def draw_geometry(
    geometry: str,
    model: Llama,
    errors: dict[int, dict[str, float]],
    reference: dict[str, Tensor],
    scale: float,
) -> None:
    """Left: a gradient and the step that the geometry makes of it. Right: error against batch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7))
    matrix = reference["layers.1.feed_forward.w1.weight"].double()
    values = torch.linalg.svdvals(matrix) if geometry == "nuclear" else matrix.abs().flatten()
    values = values.sort(descending=True).values / values.max()
    step = values if geometry == "euclidean" else torch.ones_like(values)
    rank = torch.arange(1, len(values) + 1)
    left.plot(rank, values, color=COLORS[0], label="gradient")
    left.plot(rank, step, color=COLORS[1], linestyle="--", label="step")
    what = "singular value" if geometry == "nuclear" else "coordinate"
    left.set(xlabel=f"{what}s of a matrix, largest first", ylabel="size (largest = 1)")
    left.set(xscale="log", yscale="log", ylim=(1e-3, 2))
    left.legend(loc="lower left")
    norm = dual_norms(model, reference)[geometry]
    sizes = torch.logspace(0, 2.6, 50)
    right.axhline(norm, color=COLORS[0], label="gradient")
    right.plot(sizes, norm * (scale / sizes) ** 0.5, color=GREY, label=r"$(N / B)^{1/2}$")
    measured = [errors[size][geometry] for size in SIZES]
    right.plot(SIZES, measured, "o", color=COLORS[1], label="error")
    right.axvline(scale, color=GREY, linestyle=":", label=f"N / M = {scale:.0f}")
    right.set(xlabel="batch size B (sequences)", ylabel=f"{LABELS[geometry]}: dual norm")
    right.set(xscale="log", yscale="log")
    right.yaxis.set_minor_formatter(NullFormatter())
    right.legend(loc="upper right", fontsize=8)
    save(figure, geometry)


def draw_estimates(model: Llama, batches: Batches) -> None:
    """What each Manhattan estimate reads, by the batch that it is measured on."""
    estimates = ("plug_in", "debiased", "cross_fitted")
    read: dict[str, list[float]] = {name: [] for name in estimates}
    cursor = FIRST
    for size in READ_WITH:
        meter = NoiseMeter(model, geometries=["manhattan"], estimates=list(estimates))
        found: dict[str, list[float]] = {name: [] for name in estimates}
        for _ in range(READINGS):
            model.zero_grad()
            with meter.measure():
                step = batches.micro_batches(cursor, batch_size=size, micro_batch_size=size // 8)
                for tokens in step:
                    with meter.sample():
                        (model(tokens[:, :-1], tokens[:, 1:]) / 8).backward()
            cursor += size
            for reading in meter.read(batch_size=size):
                scale = reading.total.noise_scale
                found[reading.total.estimate].append(float("inf") if scale is None else scale)
        for name in estimates:
            read[name].append(median(found[name]))
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    for color, name in zip(COLORS, estimates, strict=False):
        axes.plot(READ_WITH, read[name], "o-", color=color, label=name)
        print("manhattan", name, [f"{value:.0f}" for value in read[name]])
    alone = [torch.pi / 2 * size for size in READ_WITH]
    axes.plot(READ_WITH, alone, ":", color=GREY, label="plug_in of pure noise")
    axes.set(xlabel="measured batch (sequences)", ylabel="noise scale (sequences)")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)
    save(figure, "estimates")


def draw_theta() -> None:
    """Left: what a batch gains, by theta. Right: our runs of docs/results.md."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7))
    sizes = torch.logspace(0, 2.5, 100)
    left.plot(sizes, sizes / (1 + sizes), color=COLORS[0], label="Euclidean")
    left.plot(sizes, (1 - sizes**-0.5) ** 2, color=COLORS[1], label="Manhattan, nuclear")
    for theta in (0.3, 0.6, 0.9):
        left.axvline(theta**-2, color=GREY, linestyle=":")
        left.text(theta**-2 * 1.05, 0.02, f"theta {theta}", rotation=90, fontsize=7, color=GREY)
    left.set(xlabel="batch size / noise scale", ylabel="share of the largest gain", xscale="log")
    left.legend(loc="lower right", fontsize=8)
    rows = re.findall(
        r"^\| (constant|adaptive, \w+)[^|]*\| ([\w-]*) *\| *([\d.]*) *"
        r"\| ([\d.]+) ± ([\d.]+) \| (\d+) \|",
        (DOCS / "results.md").read_text(),
        flags=re.MULTILINE,
    )
    kinds = {
        ("constant", ""): ("constant", "s"),
        ("adaptive, Euclidean", "plug-in"): ("Euclidean, plug-in", "o"),
        ("adaptive, Euclidean", "cross-fitted"): ("Euclidean, cross-fitted", "^"),
        ("adaptive, Manhattan", "plug-in"): ("Manhattan, plug-in", "v"),
        ("adaptive, Manhattan", "cross-fitted"): ("Manhattan, cross-fitted", "D"),
    }
    for color, (kind, (label, marker)) in zip(COLORS, kinds.items(), strict=False):
        chosen = [row for row in rows if (row[0], row[1]) == kind]
        right.errorbar(
            [int(row[5]) for row in chosen],
            [float(row[3]) for row in chosen],
            [float(row[4]) for row in chosen],
            fmt=marker,
            color=color,
            label=label,
            markersize=4,
        )
    right.set(xlabel="steps", ylabel="validation loss (nats per token)")
    right.legend(fontsize=7)
    save(figure, "theta")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / "concepts" / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
