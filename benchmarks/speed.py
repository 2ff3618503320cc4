"""How fast a model trains, what Muon and a measurement cost, and its share of the hardware."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.harness import (
    ON_GPU,
    Pairs,
    Row,
    StepCommand,
    compute_dtype,
    host_synchronisations,
    paired,
    repeated,
    this_process,
)
from benchmarks.model import Model
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, at_least, one_of
from gns_pretrain.model.flops import flops_per_token
from gns_pretrain.noise_scale.tap import GradientTap
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.step import accumulate_gradients

GEOMETRIES = ("manhattan", "nuclear")
PARTS = ("step", "muon", "transformers")
MATMUL_SECONDS = 0.5


@dataclass
class Speed(StepCommand):
    """Tokens/s, share of the measured matmul rate, Muon, a measurement, transformers."""

    pairs: Pairs = 5 if ON_GPU else 10
    product_size: Annotated[int, at_least(1), About("n of the n x n x n matmul")] = (
        8192 if ON_GPU else 1024
    )
    read_after_steps: Annotated[
        int, at_least(0), About("steps that a reading comes later; timed together (default: 0)")
    ] = 0
    parts: Annotated[list[str], one_of(*PARTS), About("what to time (default: all of it)")] = field(
        default_factory=lambda: list(PARTS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size == self.micro_batch_size:
            raise InputError(
                f"--batch-size={self.batch_size} is one micro-batch; a measurement compares at "
                f"least 2: use a multiple of {self.micro_batch_size} above it"
            )

    def run(self) -> Iterator[Row]:
        """Yield the matmul rate, then what `measure_steps`, `measure_muon` and `Model` report."""
        world = this_process()
        rate = matmul_rate(world.device, self.product_size)
        yield {
            "measured": "product",
            "size": self.product_size,
            "dtype": str(compute_dtype(world.device)).removeprefix("torch."),
            "teraflops": round(rate / 1e12, 3),
        }
        if "step" in self.parts:
            yield from self.measure_steps(world, rate)
        if "muon" in self.parts:
            yield self.measure_muon(world)
        if "transformers" not in self.parts:
            return
        if find_spec("transformers") is None:
            yield {"measured": "model", "skipped": "transformers is not installed"}
            return
        gc.collect()  # cycles can hold a finished workload's memory
        shared = self.options("model", "vocab_size", "sequence_length", "pairs", "compile")
        for row in Model(**shared, batch_size=self.micro_batch_size).run():
            yield row | {"times_as_fast": round(1 / row["ratio"], 3)}

    def measure_steps(self, world: World, rate: float) -> Iterator[Row]:
        """Time AdamW's step without and with a measurement; `rate` is a matmul's FLOP/s."""
        with self.workload(world, "adamw") as work:
            later = self.read_after_steps
            meters = {geometry: work.meter(geometry, later) for geometry in GEOMETRIES}
            measured = {name: work.until_read(meter) for name, meter in meters.items()}
            plain = repeated(work.step, later + 1)
            steps: dict[str, Callable[[], Any]] = {"plain": plain, **measured}
            timings = paired(steps, self.pairs, world)
            step_seconds = timings.median("plain") / (later + 1)
            tokens_per_second = work.tokens / step_seconds
            token_flops = flops_per_token(self.shape(), self.sequence_length)
            waits = {name: host_synchronisations(step) for name, step in steps.items()}
            described = {**self.described("adamw"), "pairs": self.pairs}
            yield {
                "measured": "step",
                **described,
                "seconds": round(step_seconds, 5),
                "tokens_per_second": round(tokens_per_second),
                "share_of_product_rate": round(tokens_per_second * token_flops / rate, 4),
                "host_synchronisations": waits["plain"],
            }
            peaks = {name: peak_bytes(step, world) for name, step in steps.items()}
            for geometry, meter in meters.items():
                row = {
                    "measured": "measurement",
                    "geometry": geometry,
                    **described,
                    "samples": work.accumulation,
                    "read_after_steps": later,
                    **timings.cost(geometry, "plain", steps=later + 1),
                    "host_synchronisations": waits[geometry],
                }
                if peaks["plain"]:
                    allowed = statistics_bytes(meter.tap)
                    row |= {
                        "peak_gib": round(peaks[geometry] / 2**30, 3),
                        "peak_gib_without": round(peaks["plain"] / 2**30, 3),
                        "squares_and_grams_gib": round(allowed / 2**30, 3),
                        "within_squares_and_grams": peaks[geometry] - peaks["plain"] <= allowed,
                    }
                yield row

    def measure_muon(self, world: World) -> Row:
        """Time Muon's update alone against its whole step, on gradients of the same model."""
        with self.workload(world, "muon") as work:
            weights = list(work.run.model.parameters())
            accumulate_gradients(
                work.run.model, work.micro_batches(), accumulation=work.accumulation
            )
            gradients = [weight.grad for weight in weights]

            def update() -> None:
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                work.run.optimizer.step()
                work.run.optimizer.zero_grad(set_to_none=True)

            timings = paired({"update": update, "step": work.step}, self.pairs, world)
        _, share, _ = timings.quartiles("update", "step")
        return {
            "measured": "muon",
            **self.described("muon"),
            "pairs": self.pairs,
            "seconds": round(timings.median("step"), 5),
            "optimizer_seconds": round(timings.median("update"), 5),
            "optimizer_share_of_step_percent": round(100 * share, 2),
        }


def matmul_rate(device: torch.device, size: int) -> float:
    """Return the FLOP/s of one [n, n] x [n, n] matmul of normal numbers, the median."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(compute_dtype(device))
        for _ in range(2)
    )
    timer = Timer(
        "torch.mm(left, right, out=out)",
        globals={"torch": torch, "left": left, "right": right, "out": torch.empty_like(left)},
        num_threads=torch.get_num_threads(),
    )
    return 2.0 * size**3 / timer.blocked_autorange(min_run_time=MATMUL_SECONDS).median


def peak_bytes(step: Callable[[], Any], world: World) -> int:
    """Return the peak of allocated bytes during a step; 0 on a CPU, where nothing counts them."""
    if world.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def statistics_bytes(tap: GradientTap) -> int:
    """Return the size of what a tap gathers on one process: float32 squares, float64 Grams."""
    squares = sum(4 * tapped.weight.numel() for tapped in tap.weights)
    owned = [tapped.weight for tapped in tap.weights if tapped.owner is not None]
    grams = sum(8 * min(weight.shape) ** 2 for weight in owned)
    return squares * tap.needs.squares + grams
