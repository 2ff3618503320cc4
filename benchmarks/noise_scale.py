"""What a measurement of the noise scale costs a training step, on one process or on several."""

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.foreign import FOREIGN_MODELS, ForeignLoop
from benchmarks.harness import (
    ModelCommand,
    Pairs,
    Row,
    Timings,
    paired,
    repeated,
    until_read,
    workload,
)
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, at_least, one_of
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, World, joined, pick_device


@dataclass
class NoiseScale(ModelCommand):
    """A training step with a measurement of the noise scale against one without."""

    ranks: Annotated[list[int], at_least(1), About("processes; several: FSDP2 (default: 1)")] = (
        field(default_factory=lambda: [1])
    )
    geometry: Annotated[
        list[str], one_of(*GEOMETRIES), About("one row each (default: all of them)")
    ] = field(default_factory=lambda: list(GEOMETRIES))
    estimate: Annotated[list[str], About("all in one measurement (default: plug_in)")] = field(
        default_factory=lambda: ["plug_in"]
    )
    square_root: Annotated[str, About("auto, iterative or exact")] = "auto"
    read_after_steps: Annotated[
        int, at_least(0), About("steps that a reading comes later; timed together (default: 0)")
    ] = 0
    foreign: Annotated[
        str,
        one_of("none", *FOREIGN_MODELS),
        About("a model of transformers in a plain loop, instead of --model (default: none)"),
    ] = "none"
    samples: Annotated[int, at_least(2), About("micro-batches over all ranks")] = 8
    micro_batch_size: Annotated[int, at_least(1), About("sequences")] = 2
    sequence_length: Annotated[int, at_least(1), About("tokens")] = 128
    pairs: Pairs = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for ranks in self.ranks:
            if self.samples % ranks:
                raise InputError(
                    f"--samples={self.samples} is not a multiple of --ranks={ranks}; "
                    "use one that is"
                )

    def run(self) -> Iterator[Row]:
        """Yield a row for each number of ranks and geometry; costs are medians of paired ratios."""
        for num_ranks, geometry in product(self.ranks, self.geometry):
            settings = NoiseScaleSettings(
                [geometry],
                self.estimate,
                every_steps=self.read_after_steps + 1,
                read_after_steps=self.read_after_steps,
                square_root=self.square_root,
            )
            timings, seconds = self.on_ranks(num_ranks, settings)
            yield {
                "measured": "noise_scale",
                "geometry": geometry,
                "estimates": ", ".join(self.estimate),
                "ranks": num_ranks,
                "model": self.model if self.foreign == "none" else f"transformers' {self.foreign}",
                **self.options("square_root", "read_after_steps", "samples", "micro_batch_size"),
                **self.options("sequence_length", "pairs"),
                "plain_step_seconds": round(timings.median("plain") / settings.every_steps, 4),
                "measurement_seconds": round(seconds, 4),
                **timings.cost("measured", "plain", steps=settings.every_steps),
            }

    def on_ranks(self, num_ranks: int, settings: NoiseScaleSettings) -> tuple[Timings, float]:
        """Return the first rank's results; several are started on this machine."""
        if num_ranks == 1:
            return self.on_rank(settings, RankInfo())
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{Path(folder) / 'meeting'}"
            ranks = [RankInfo(r, num_ranks, r, num_ranks, meeting) for r in range(num_ranks)]
            # Ranks forked by a server leave by os._exit; spawned ones would finalize Python.
            with multiprocessing.get_context("forkserver").Pool(num_ranks) as pool:
                return pool.starmap(self.on_rank, [(settings, rank) for rank in ranks])[0]

    def on_rank(self, settings: NoiseScaleSettings, rank: RankInfo) -> tuple[Timings, float]:
        """Return one rank's timings, and the median seconds that the meter itself counts."""
        device = pick_device("auto", rank.local_rank)
        if rank.num_ranks > 1 and device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // rank.num_ranks))
        with joined(rank, ParallelSettings(), device) as world:
            if self.foreign != "none":
                return self.on_rank_foreign(settings, world)
            with workload(
                self.shape(),
                world,
                batch_size=self.samples * self.micro_batch_size,
                micro_batch_size=self.micro_batch_size,
                sequence_length=self.sequence_length,
            ) as work:
                meter = NoiseMeter(work.run.model, settings)
                return self.timed(work.step, work.until_read(meter), world)

    def on_rank_foreign(self, settings: NoiseScaleSettings, world: World) -> tuple[Timings, float]:
        """The same of a model that is not ours, in a loop that is not."""
        loop = ForeignLoop(
            self.foreign,
            world,
            accumulation=self.samples // world.num_ranks,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
        )
        off, meter = NoiseMeter(loop.model), NoiseMeter(loop.model, settings)
        measured = until_read(partial(loop.step, meter), meter)
        return self.timed(lambda: loop.step(off), measured, world)

    def timed(
        self, plain: Callable[[], object], measured: Callable[[], list[Reading]], world: World
    ) -> tuple[Timings, float]:
        """Time alternating steps; also return the seconds that the meter itself counts."""
        own: list[float] = []
        steps: dict[str, Callable[[], object]] = {
            "plain": repeated(plain, self.read_after_steps + 1),
            "measured": lambda: own.append(measured()[0].seconds),
        }
        timings = paired(steps, self.pairs, world)
        return timings, statistics.median(own[-self.pairs :])
