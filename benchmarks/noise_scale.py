"""What a measurement of the noise scale costs a training step: behind scripts/benchmark.py."""

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.collectives import barrier
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined, pick_device
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import train_step

WARM_UP_PAIRS = 2
Row = dict[str, Any]


def measure_cost(
    config: LlamaConfig,
    settings: NoiseScaleSettings,
    *,
    num_ranks: int,
    micro_batch_size: int,
    accumulation: int,
    sequence_length: int,
    pairs: int,
) -> Row:
    """Time steps with and without a measurement in turns, on one process or on several.

    Args:
        config: the model, with a vocabulary.
        settings: what is measured.
        num_ranks: 1 takes this process; more start ranks on this machine, with FSDP2.
        micro_batch_size: sequences of a sample.
        accumulation: samples of a rank in a step.
        sequence_length: tokens.
        pairs: timed steps of each kind.

    Returns:
        One row; `cost_every_step` is the extra time of a measured step over a plain one's, in per
        cent (median of paired ratios, with quartiles), and `cost_every_100_steps` a hundredth.
    """
    arguments = (config, settings, micro_batch_size, accumulation, sequence_length, pairs)
    if num_ranks == 1:
        ratios, plain, seconds = timed_pairs(RankInfo(), *arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{Path(folder) / 'meeting'}"
            places = [
                RankInfo(rank, num_ranks, rank, num_ranks, meeting) for rank in range(num_ranks)
            ]
            with multiprocessing.get_context("spawn").Pool(num_ranks) as pool:
                results = pool.starmap(timed_pairs, [(place, *arguments) for place in places])
        ratios, plain, seconds = results[0]
    low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
    return {
        "measured": "noise_scale",
        "geometry": ", ".join(settings.geometries),
        "estimates": ", ".join(settings.estimates),
        "square_root": settings.square_root,
        "model": config.name,
        "ranks": num_ranks,
        "samples": num_ranks * accumulation,
        "micro_batch_size": micro_batch_size,
        "sequence_length": sequence_length,
        "pairs": pairs,
        "plain_step_seconds": round(plain, 4),
        "measurement_seconds": round(seconds, 4),
        "cost_every_step_percent": round(middle, 2),
        "quartiles_percent": [round(low, 2), round(high, 2)],
        "cost_every_100_steps_percent": round(middle / 100, 4),
    }


def timed_pairs(
    place: RankInfo,
    config: LlamaConfig,
    settings: NoiseScaleSettings,
    micro_batch_size: int,
    accumulation: int,
    sequence_length: int,
    pairs: int,
) -> tuple[list[float], float, float]:
    """One rank's part: measured / plain of each pair, the plain median, the meter's own time."""
    device = pick_device("auto", place.local_rank)
    if place.num_ranks > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // place.num_ranks))
    with joined(place, ParallelSettings(), device) as world:
        with device:
            llama = Llama(config)
        llama.init_weights(seed=0)
        on_gpu = device.type == "cuda"
        model = parallelize(llama, world, compute_dtype=torch.bfloat16 if on_gpu else torch.float32)
        optimizer = AdamWSettings(lr=1e-4).build(model)
        meter = NoiseMeter(model, world, settings)
        batch = random_batch(world, config, micro_batch_size, accumulation, sequence_length)

        def step(measured: bool) -> tuple[float, float]:
            settle(world)
            began = time.perf_counter()
            result = train_step(
                model,
                optimizer,
                batch,
                accumulation=accumulation,
                gradient_clip=1.0,
                batch_size=world.num_ranks * accumulation * micro_batch_size,
                meter=meter if measured else None,
            )
            settle(world)
            own = result.readings[0].seconds if result.readings else 0.0
            return time.perf_counter() - began, own

        plain: list[float] = []
        measured: list[float] = []
        own: list[float] = []
        for index in range(WARM_UP_PAIRS + pairs):
            # Who goes first changes, so that a slow moment of the machine hits both alike.
            for is_measured in (False, True) if index % 2 else (True, False):
                seconds, meter_seconds = step(is_measured)
                if index >= WARM_UP_PAIRS:
                    (measured if is_measured else plain).append(seconds)
                    if is_measured:
                        own.append(meter_seconds)
    ratios = [m / p for m, p in zip(measured, plain, strict=True)]
    return ratios, statistics.median(plain), statistics.median(own)


def settle(world: World) -> None:
    """Wait for the device and for the other ranks, so that a clock reads whole steps."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    barrier(world)


def random_batch(
    world: World,
    config: LlamaConfig,
    micro_batch_size: int,
    accumulation: int,
    sequence_length: int,
) -> list[Tensor]:
    """This rank's micro-batches, [micro_batch_size, L + 1] each."""
    generator = torch.Generator().manual_seed(world.rank)
    shape = (accumulation, micro_batch_size, sequence_length + 1)
    tokens = torch.randint(config.known_vocab_size, shape, generator=generator)
    return list(tokens.to(world.device))
