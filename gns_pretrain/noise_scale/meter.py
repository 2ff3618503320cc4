"""From what the tap has gathered to noise and signal: each rank its part, then one all-reduce."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from gns_pretrain.model.llama import Kind
from gns_pretrain.noise_scale.geometries import Measurement, euclidean_cross_signal, measure
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.noise_scale.sums import COLUMN, SampleSums, totals_of
from gns_pretrain.noise_scale.tap import GradientTap, TapNeeds, sample_sums
from gns_pretrain.parallel.collectives import sum_over_ranks
from gns_pretrain.parallel.mesh import World


@dataclass(frozen=True)
class Reading:
    """One geometry and estimate of one step, of the whole model and of its parts."""

    total: Measurement
    parts: dict[str, Measurement]  # by kind of parameter and by block, where asked for
    seconds: float  # host time of the whole step's measurement, all geometries together
    num_fallbacks: int = 0  # of Nuclear's square roots, those that took eigenvalues after all


class NoiseMeter:
    """Measures the noise scale of single steps.

    Args:
        model: laid over ranks by `parallelize`.
        world: its ranks; all of them measure together.
        settings: geometries, estimates and what they look at.
    """

    def __init__(self, model: nn.Module, world: World, settings: NoiseScaleSettings) -> None:
        self.settings = settings
        self.world = world
        self.tap = GradientTap(model, world, needs_of(settings))

    @contextmanager
    def armed(self, accumulation: int) -> Iterator[None]:
        """Listen during the backward passes of one step."""
        with self.tap.armed(accumulation):
            yield

    def end_of_sample(self) -> None:
        """After each backward pass."""
        self.tap.end_of_sample()

    @torch.no_grad()
    def read(self, batch_size: int) -> list[Reading]:
        """Noise and signal of the step, after its backward passes and before clipping.

        Args:
            batch_size: B, sequences of the step over all ranks.

        Returns:
            One reading for each geometry and estimate that was asked for, the same on every rank.
        """
        started = time.perf_counter()
        sums = sample_sums(self.tap)
        table = self._table(sums, batch_size)
        self.tap.release()
        seconds = self.tap.seconds + time.perf_counter() - started
        return self._readings(table, batch_size, sums.num_samples, seconds)

    @torch.no_grad()
    def readings_of(self, sums: SampleSums, batch_size: int) -> list[Reading]:
        """The same from sums that were gathered before; all ranks together."""
        return self._readings(self._table(sums, batch_size), batch_size, sums.num_samples, 0.0)

    def _table(self, sums: SampleSums, batch_size: int) -> list[list[float]]:
        """Totals of each weight over all ranks: one all-reduce of kilobytes, one look at it."""
        totals = totals_of(sums, batch_size=batch_size, square_root=self.settings.square_root)
        table: list[list[float]] = sum_over_ranks(totals, self.world).tolist()
        return table

    def _readings(
        self, table: list[list[float]], batch_size: int, samples: int, seconds: float
    ) -> list[Reading]:
        """Measurements of the whole model, and of its parts where asked for."""
        readings = []
        for geometry in self.settings.geometries:
            chosen = self._chosen(geometry)
            for estimate in self.settings.estimates_of(geometry):

                def of(
                    rows: list[int], geometry: str = geometry, estimate: str = estimate
                ) -> Measurement:
                    return self._measurement(table, rows, geometry, estimate, batch_size, samples)

                parts = {name: of(rows) for name, rows in self._parts(chosen).items()}
                fallbacks = sum(table[i][COLUMN["fallbacks"]] for i in chosen)
                readings.append(
                    Reading(
                        of(chosen),
                        parts,
                        seconds,
                        num_fallbacks=round(fallbacks) if geometry == "nuclear" else 0,
                    )
                )
        return readings

    def _chosen(self, geometry: str) -> list[int]:
        """Weights that a geometry looks at."""
        blocks = (Kind.ATTENTION, Kind.FEED_FORWARD)
        return [
            index
            for index, weight in enumerate(self.tap.weights)
            if (
                weight.owner is not None
                if geometry == "nuclear"
                else self.settings.parameters == "all" or weight.kind in blocks
            )
        ]

    def _parts(self, chosen: list[int]) -> dict[str, list[int]]:
        """The chosen weights by kind and by block, as far as the settings ask for them."""
        parts: dict[str, list[int]] = {}
        for index in chosen:
            weight = self.tap.weights[index]
            if self.settings.per_kind:
                parts.setdefault(weight.kind.name.lower(), []).append(index)
            if self.settings.per_layer and weight.block.startswith("layers."):
                parts.setdefault(weight.block, []).append(index)
        return parts

    def _measurement(
        self,
        table: list[list[float]],
        rows: list[int],
        geometry: str,
        estimate: str,
        batch_size: int,
        samples: int,
    ) -> Measurement:
        """Noise and signal from the table's sums over some weights."""
        sums = {name: sum(table[row][column] for row in rows) for name, column in COLUMN.items()}
        if geometry == "euclidean":
            spread = max(sums["sample_squares"] / samples - sums["mean_squares"], 0.0)
            noise, signal = spread * batch_size / (samples - 1), sums["mean_squares"]
            cross = euclidean_cross_signal(
                torch.tensor([sums["cross_product"], sums["cross_first"], sums["cross_second"]])
            ).item()
        elif geometry == "manhattan":
            noise, signal, cross = sums["sigma"], sums["mean_abs"], sums["manhattan_cross"]
        else:
            noise, signal, cross = sums["trace_root"], sums["nuclear_norm"], sums["nuclear_cross"]
        measurement = measure(
            geometry,
            estimate,
            noise_total=noise,
            signal_total=cross if estimate == "cross_fitted" else signal,
            batch_size=batch_size,
            num_samples=samples,
        )
        if geometry == "nuclear" and self.settings.nuclear_local_batch_factor:
            return replace(measurement, noise=measurement.noise * batch_size / samples)
        return measurement


def needs_of(settings: NoiseScaleSettings) -> TapNeeds:
    """What the tap must gather for what the settings ask for."""
    return TapNeeds(
        squares="manhattan" in settings.geometries,
        signed_sums="cross_fitted" in settings.estimates,
        grams="nuclear" in settings.geometries,
        all_2d=settings.nuclear_parameters == "all_2d",
    )
