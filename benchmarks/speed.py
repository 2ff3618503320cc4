"""How fast a model trains, what Muon and a measurement cost, and how near that is to the chip."""

import gc
import statistics
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.model import compare_with_transformers, flops_per_token
from benchmarks.optimizer import alternate, quartiles, timed
from benchmarks.workload import Training, Workload, training
from gns_pretrain.noise_scale.tap import GradientTap
from gns_pretrain.training.step import accumulate_gradients

GEOMETRIES = ("manhattan", "nuclear")
PRODUCTS = 10  # timed, after three
Row = dict[str, Any]


def measure_speed(
    workload: Workload, *, device: torch.device, pairs: int, product_size: int
) -> Iterable[Row]:
    """Rows for one model, each as soon as it is measured.

    Args:
        workload: its optimizer is chosen here.
        device: where.
        pairs: timed steps of each kind.
        product_size: n of the n x n x n product that stands for what the chip can do.

    Yields:
        The product's rate; AdamW's step with its share of that rate; a measured step against a
        plain one, in time and on a GPU in memory; Muon's step; the step against transformers.
    """
    rate = product_rate(device, product_size)
    yield {
        "measured": "product",
        "size": product_size,
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "teraflops": round(rate / 1e12, 3),
    }
    yield from measure_step(workload, device=device, pairs=pairs, rate=rate)
    freed(device)
    yield measure_muon(replace(workload, optimizer="muon"), device=device, pairs=pairs)
    freed(device)
    if find_spec("transformers") is None:
        yield {"measured": "model", "skipped": "transformers is not installed"}
        return
    row = compare_with_transformers(
        workload.model,
        batch_size=workload.micro_batch_size,
        sequence_length=workload.sequence_length,
        pairs=max(pairs, 2),
        compiled=workload.compiled,
        device=device,
    )
    yield {**row, "times_as_fast": round(1 / row["ratio"], 3)}
    freed(device)


def measure_step(
    workload: Workload, *, device: torch.device, pairs: int, rate: float
) -> Iterable[Row]:
    """AdamW's step without a measurement and with one, in turns."""
    with training(workload, device, GEOMETRIES) as trained:
        steps: dict[str, Any] = {"plain": trained.step}
        for geometry in GEOMETRIES:
            steps[geometry] = lambda geometry=geometry: trained.step(geometry)
        seconds = alternate(steps, pairs, device)
        median = statistics.median(seconds["plain"])
        tokens_per_second = workload.tokens / median
        yield {
            "measured": "step",
            **workload.described(),
            "pairs": pairs,
            "seconds": round(median, 5),
            "tokens_per_second": round(tokens_per_second),
            "share_of_product_rate": round(
                product_share(
                    tokens_per_second,
                    flops_per_token(workload.model, workload.sequence_length),
                    rate,
                ),
                4,
            ),
        }
        memory = {kind: peak_memory(steps[kind], device) for kind in steps}
        for geometry in GEOMETRIES:
            yield {
                "measured": "measurement",
                "geometry": geometry,
                **workload.described(),
                "samples": workload.accumulation,
                "pairs": pairs,
                **cost_rows(seconds[geometry], seconds["plain"]),
                **memory_rows(memory[geometry], memory["plain"], trained, geometry),
            }


def measure_muon(workload: Workload, *, device: torch.device, pairs: int) -> Row:
    """Muon's update alone against its whole step, on the same gradients' shapes."""
    with training(workload, device) as trained:

        def update() -> None:
            trained.optimizer.step()

        trained.step()
        shares, whole, alone = [], [], []
        for _ in range(pairs + 1):
            whole.append(timed(trained.step, device))
            accumulate_gradients(
                trained.model, trained.micro_batches(), accumulation=workload.accumulation
            )
            alone.append(timed(update, device))
            trained.optimizer.zero_grad(set_to_none=True)
            shares.append(alone[-1] / whole[-1])
    return {
        "measured": "muon",
        **workload.described(),
        "pairs": pairs,
        "seconds": round(statistics.median(whole[1:]), 5),
        "optimizer_seconds": round(statistics.median(alone[1:]), 5),
        "optimizer_share_of_step_percent": round(100 * statistics.median(shares[1:]), 2),
    }


def product_share(tokens_per_second: float, flops: float, product_rate: float) -> float:
    """Share of the chip's product rate that a model's own arithmetic makes up.

        tokens/s * (6 P + 6 L D T) / rate

    Args:
        tokens_per_second: of training.
        flops: of a token, from `flops_per_token`: 6 for each parameter that multiplies, and causal
            attention; recomputation does not count.
        product_rate: operations a second, from `product_rate`.
    """
    return tokens_per_second * flops / product_rate


def product_rate(device: torch.device, size: int) -> float:
    """Operations a second of one [n, n] x [n, n] product of normal numbers, the median."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(compute_dtype(device))
        for _ in range(2)
    )
    out = torch.empty_like(left)
    for _ in range(3):
        torch.mm(left, right, out=out)
    seconds = [timed(lambda: torch.mm(left, right, out=out), device) for _ in range(PRODUCTS)]
    return 2.0 * size**3 / statistics.median(seconds)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cost_rows(measured: list[float], plain: list[float]) -> Row:
    """The extra time of a measured step in per cent, and spread over 100 steps."""
    ratios = quartiles("ratio", measured, plain)
    cost = 100 * (ratios["ratio"] - 1)
    return {
        "cost_every_step_percent": round(cost, 1),
        "quartiles_percent": [round(100 * (q - 1), 1) for q in ratios["ratio_quartiles"]],
        "cost_every_100_steps_percent": round(cost / 100, 3),
    }


def peak_memory(step: Any, device: torch.device) -> int | None:
    """Most bytes that tensors took during a step; None on a CPU, where nobody counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def memory_rows(measured: int | None, plain: int | None, trained: Training, geometry: str) -> Row:
    """Peak memory with a measurement and without, and what it may take."""
    if measured is None or plain is None:
        return {}
    allowed = statistics_bytes(trained.meters[geometry].tap)
    return {
        "peak_gib": round(measured / 2**30, 3),
        "peak_gib_without": round(plain / 2**30, 3),
        "squares_and_grams_gib": round(allowed / 2**30, 3),
        "within_squares_and_grams": measured - plain <= allowed,
    }


def statistics_bytes(tap: GradientTap) -> int:
    """Squares in float32 and Grams in float64, as far as the tap gathers them, on one process."""
    squares = sum(4 * weight.shape.numel() for weight in tap.weights)
    grams = sum(8 * min(weight.shape) ** 2 for weight in tap.weights if weight.owner is not None)
    return squares * tap.needs.squares + grams


def freed(device: torch.device) -> None:
    """Give a finished model's memory back before the next one is built."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
