"""From what the tap has gathered to noise and signal: each rank its part, then one all-reduce."""

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import nn

from gns_pretrain.noise_scale.geometries import GEOMETRIES, Measurement, Needs, SampleSums
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.noise_scale.tap import GradientTap
from gns_pretrain.parallel.collectives import sum_over_ranks
from gns_pretrain.parallel.mesh import World


@dataclass(frozen=True)
class Reading:
    """One geometry and estimate of one step, of the whole model and of its parts."""

    total: Measurement
    parts: dict[str, Measurement]  # by kind of parameter and by block, where asked for
    seconds: float  # host time of the whole step's measurement, all geometries together
    details: dict[str, Any] = field(default_factory=dict)  # of the geometry, for the record


class NoiseMeter:
    """Measures the noise scale of a parallelized model in single steps that its `tap` gathers."""

    def __init__(self, model: nn.Module, world: World, settings: NoiseScaleSettings) -> None:
        self.settings = settings
        self.world = world
        self.geometries = [GEOMETRIES[name](settings) for name in settings.geometries]
        signed = any(estimate == "cross_fitted" for _, estimate in settings.measured)
        needs = reduce(or_, (geometry.needs for geometry in self.geometries), Needs())
        self.tap = GradientTap(model, world, needs | Needs(signed_sums=signed))

    @torch.no_grad()
    def read(self, batch_size: int) -> list[Reading]:
        """Return a reading for each geometry and estimate asked for, the same on every rank.

        Call it on all ranks, after the step's backward passes and before clipping.
        """
        with self.tap.measuring():
            readings = self.readings_of(self.tap.sums(), batch_size)
            self.tap.release()
        return [replace(reading, seconds=self.tap.seconds) for reading in readings]

    @torch.no_grad()
    def readings_of(self, sums: SampleSums, batch_size: int) -> list[Reading]:
        """Return the same from sums that were gathered before; all ranks together."""
        of_rank = [geometry.totals(sums, batch_size) for geometry in self.geometries]
        # One all-reduce of kilobytes, and one wait for the device.
        joined = sum_over_ranks(torch.cat(of_rank, dim=1), self.world).cpu()
        totals = joined.split([table.shape[1] for table in of_rank], dim=1)
        counts = {"batch_size": batch_size, "num_samples": sums.num_samples}
        readings = []
        for geometry, table in zip(self.geometries, totals, strict=True):
            rows = table.tolist()  # [weight][column]
            weights = [i for i, w in enumerate(self.tap.weights) if geometry.looks_at(w.kind)]
            whole = added(rows, weights)
            parts = {name: added(rows, some) for name, some in self._parts(weights).items()}
            for estimate in self.settings.estimates_of(geometry.name):
                total = geometry.measure(estimate, whole, **counts)
                of_parts = {
                    name: geometry.measure(estimate, part, **counts) for name, part in parts.items()
                }
                readings.append(Reading(total, of_parts, 0.0, geometry.details(whole)))
        return readings

    def _parts(self, weights: list[int]) -> dict[str, list[int]]:
        """Weights by kind and by block, as far as the settings ask for them."""
        parts: dict[str, list[int]] = {}
        for index in weights:
            weight = self.tap.weights[index]
            if self.settings.per_kind:
                parts.setdefault(weight.kind.name.lower(), []).append(index)
            if self.settings.per_layer and weight.block.startswith("layers."):
                parts.setdefault(weight.block, []).append(index)
        return parts


def added(table: list[list[float]], rows: list[int]) -> list[float]:
    return [sum(table[row][column] for row in rows) for column in range(len(table[0]))]
