"""Measuring the noise scale of any model while it trains.

From what the tap has gathered to noise and signal: each rank computes its part, then one all-reduce
of kilobytes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.roles import Labels, MatrixChoice, Role, labels_of, named_trainable
from gns_pretrain.noise_scale.equations import check_num_samples
from gns_pretrain.noise_scale.geometries import (
    GEOMETRIES,
    Geometry,
    Measurement,
)
from gns_pretrain.noise_scale.host_spectra import HostSpectra, PendingTotal
from gns_pretrain.noise_scale.sample_sums import Needs, SampleSums
from gns_pretrain.noise_scale.settings import MeterOptions, NoiseScaleSettings
from gns_pretrain.noise_scale.stopwatch import Stopwatch
from gns_pretrain.noise_scale.tap import GradientTap
from gns_pretrain.parallel.collectives import reduce_over

# Relative difference of a weight's mean gradient and the mean of its samples that is more than
# rounding, also where ranks reduce in bfloat16; and where `.grad` itself adds up in half precision.
DISAGREEMENT, IN_HALF_PRECISION = 0.02, 0.1


@dataclass(frozen=True)
class Reading:
    """One geometry and estimate of one step, of the whole model and of its parts."""

    total: Measurement
    parts: dict[str, Measurement]  # by kind of parameter and by block, where asked for
    # Of the whole step's measurement, all geometries together: the host's time on a CPU, the
    # device's own on a GPU, without its wait for the step's other kernels.
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)  # of the geometry, for the record
    step: int = 0  # that was measured, by `NoiseMeter.step`


@dataclass
class Pending:
    """A measurement between its step and the one at whose end it is read."""

    step: int
    due: int  # step at whose end it is read
    readings: list[Reading] | None = None  # once they are known
    totals: "RankTotals | None" = None  # before


@dataclass
class RankTotals:
    """One rank's part of a measurement, before ranks are joined."""

    tables: list[Tensor]  # [W, columns] of each geometry, float64, on the device
    on_host: list[list[PendingTotal]]  # of each geometry, what its table still lacks
    agreement: Tensor  # [W, 2]; see `GradientTap`
    num_samples: int
    batch_size: int
    stopwatch: Stopwatch
    geometries: list[Geometry]  # of the tables
    momentum_noise: list[float]  # by weight, where it is the momentum's that is asked for


class NoiseMeter:
    """Measures the noise scale of a model in single optimizer steps.

        meter = NoiseMeter(model, geometries=["manhattan", "nuclear"], every_steps=100)
        for step, batch in enumerate(batches, 1):
            with meter.step(step):
                for micro_batch in batch:
                    with meter.sample():
                        (loss(model, micro_batch) / len(batch)).backward()
            readings = meter.read(batch_size=len(batch) * micro_batch_size * num_ranks)
            optimizer.step()
            optimizer.zero_grad()

    Measured are step 1 and every `every_steps`-th one; other steps cost nothing. A sample is what
    one micro-batch leaves on one data-parallel rank, all of one size and as many on every rank; a
    step takes two at least. Each sample's loss is divided by the number of samples of its rank, so
    that `.grad` is the mean over samples when `read` is called: after the last backward pass and
    before clipping, on all ranks. Measuring changes no gradient by a bit.

    With `read_after_steps=D` `read` returns a reading at the end of the D-th step after the one
    measured, and [] before; eigenvalues, which the nuclear scale takes, are computed meanwhile by
    threads of the host. `read` is then called at every step, and `read_pending` after the last.

    Args:
        model: any module, plain or after DDP, fully_shard (FSDP2, HSDP), parallelize_module or
            torch.compile; with gradients reduced at each micro-batch or at the last one.
        settings: what is measured and how often; None makes them of `options`, such as
            `geometries`, without which nothing is measured.
        matrices: which parameters are matrices, for the nuclear scale and
            `parameters="block_matrices"`; by default those inside the model (`parameter_roles`).
        blocks: whose gradients come close together and are reduced together; by default a layer's.
        kinds: labels of parameters for `per_kind`; by default their roles.
        optimizer: over the model's parameters, for the geometries `adam` and `composite` and for
            `of_momentum`, which read its state, rates and momenta before it steps. Until Adam has
            taken a step, what divides by its second moments is not measured.
        options: fields of `settings`, by name.

    Raises:
        InputError: a setting or pattern that cannot be, no trainable parameter, or a
            layout that is not supported: weights over different meshes, or left out of FSDP2. On a
            measured step too, if the parameters are no longer those that the meter was made for.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: NoiseScaleSettings | None = None,
        *,
        matrices: MatrixChoice | None = None,
        blocks: Labels | Sequence[str] | None = None,
        kinds: Labels | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[MeterOptions],
    ) -> None:
        self.settings = replace(settings or NoiseScaleSettings(), **options)
        self.geometries = [GEOMETRIES[name](self.settings) for name in self.settings.geometries]
        needs = reduce(or_, (geometry.needs for geometry in self.geometries), Needs())
        roles = {role for role in Role for g in self.geometries if g.looks_at(role)}
        if not roles or Role.MATRIX in roles:  # others cost little beside them, and are checked too
            roles = set(Role)
        if not (optimizer is None or hasattr(optimizer, "param_groups")):
            raise InputError(
                f"optimizer={type(optimizer).__name__} is no optimizer; give the meter the "
                "torch.optim.Optimizer that steps this model"
            )
        self.tap = GradientTap(
            model,
            needs | self.settings.needs,
            matrices,
            blocks,
            roles=roles,
            optimizer=optimizer,
        )
        self._check_optimizer()
        self._kinds = {tapped.name: tapped.role.name.lower() for tapped in self.tap.weights}
        if kinds is not None:
            names = [name for name, _ in named_trainable(model)]
            self._kinds |= labels_of(names, kinds, "kinds")
        self._step = 0
        self._measured = False  # whether the last step was, and has not been read
        self._pending: list[Pending] = []  # oldest first
        self._host = HostSpectra(self.tap.device)

    def step(self, step: int, *, is_due: bool | None = None) -> AbstractContextManager[None]:
        """Measure the optimizer step within, if it is its turn.

        Args:
            step: its number, from 1.
            is_due: whether it is, where the caller knows; None: as `every_steps` says.
        """
        if step < 1:
            raise InputError(f"meter.step({step}): steps count from 1")
        self._measured = False
        if not (self.settings.measures_at(step) if is_due is None else is_due):
            self._step = step
            return nullcontext()
        self._step = step - 1
        return self.measure()

    @contextmanager
    def measure(self, *, first_round: int = 0) -> Iterator[None]:
        """Measure the optimizer step within, which follows the last one.

        Args:
            first_round: samples of each rank that came before, of the same batch: parities, which
                cross-fitted estimates go by, count from there.
        """
        self._step += 1
        with self.tap.listening(first_round=first_round):
            yield
        self._measured = True

    def sample(self) -> AbstractContextManager[None]:
        """Take the backward pass within as one sample; nothing happens on unmeasured steps."""
        return self.tap.sample() if self.tap.armed else nullcontext()

    @torch.no_grad()
    def read(self, batch_size: int, *, loss_scale: float = 1.0) -> list[Reading]:
        """Return a reading for each geometry and estimate, the same on every rank.

        Call it on all ranks, after the step's backward passes and before clipping.

        Args:
            batch_size: B, sequences (or images, ...) of the step over all ranks.
            loss_scale: by which the loss was multiplied, as torch.amp.GradScaler does: its
                `get_scale()`, if `unscale_` comes after.

        Returns:
            Those of this step, or of an earlier one with `read_after_steps`; empty where none is
            due.

        Raises:
            InputError: fewer than two samples; or `.grad` is not the mean of the samples, because
                it was not zero before, or was clipped, unscaled or zeroed since, or because some
                backward pass was no sample.
        """
        if self._measured:
            self._measured = False
            later = self.settings.read_after_steps
            with self.tap.measuring():
                sums = self.tap.sums(loss_scale=loss_scale)
                totals = self._totals(sums, batch_size, on_host=later > 0)
                self.tap.release()
            self._pending.append(Pending(self._step, self._step + later, totals=totals))
        due = [each for each in self._pending if each.due <= self._step]
        self._pending = [each for each in self._pending if each.due > self._step]
        return [reading for each in due for reading in self._finished(each)]

    def read_pending(self) -> list[Reading]:
        """Return what is measured and not read yet: after the last step, on all ranks."""
        pending, self._pending = self._pending, []
        return [reading for each in pending for reading in self._finished(each)]

    def without_this_step(self, readings: list[Reading]) -> list[Reading]:
        """Drop what the current step measured, from what it read and from what is pending."""
        self._pending = [each for each in self._pending if each.step != self._step]
        return [reading for reading in readings if reading.step != self._step]

    @property
    def pending(self) -> bool:
        """Whether a step has been measured and not been read, by `read_after_steps`."""
        return bool(self._pending)

    def state_dict(self) -> dict[str, Any]:
        """Return what is pending, fit for JSON, the same on every rank; all ranks together.

        It is waited for, and read at its step all the same. Empty where nothing is pending.
        """
        pending = [
            {
                "step": each.step,
                "due": each.due,
                "readings": [asdict(reading) for reading in self._finished(each)],
            }
            for each in self._pending
        ]
        return {"pending_readings": pending} if pending else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, on this or another number of ranks."""
        self._pending = [
            Pending(each["step"], each["due"], [reading_from(r) for r in each["readings"]])
            for each in state.get("pending_readings", [])
        ]

    @torch.no_grad()
    def sums(self) -> SampleSums:
        """Return what the samples of the measured step left on this rank, for `readings_of`."""
        self._measured = False
        return self.tap.sums()

    @torch.no_grad()
    def readings_of(self, sums: SampleSums, batch_size: int) -> list[Reading]:
        """Return readings from the sums of samples; all ranks together."""
        return self._readings(self._totals(sums, batch_size))

    def _totals(self, sums: SampleSums, batch_size: int, *, on_host: bool = False) -> RankTotals:
        """Return this rank's totals; with `on_host` its threads compute those that may wait."""
        check_num_samples(sums.num_samples)
        if sums.num_samples < (fewest := self.settings.fewest_samples):
            raise InputError(
                f"estimates=[{', '.join(self.settings.estimates)}] needs {fewest} samples a step, "
                f"and this one had {sums.num_samples}; take more micro-batches, or leave nested out"
            )
        if not isinstance(batch_size, int) or batch_size < 1 or batch_size % sums.num_samples:
            raise InputError(
                f"batch_size={batch_size} is not a multiple of the {sums.num_samples} samples of "
                "the step, which are of one size; give the sequences of all ranks together"
            )
        self._check_optimizer()
        updates = self.tap.updates
        geometries = [
            geometry
            for geometry in self.geometries
            if not geometry.needs.second_moments or (updates and updates.has_second_moments)
        ]
        tables = [geometry.totals(sums, batch_size) for geometry in geometries]
        pending: list[list[PendingTotal]] = [[] for _ in tables]
        for place, (geometry, table) in enumerate(zip(geometries, tables, strict=True)):
            spectral = geometry.spectral_totals(sums, batch_size)
            if on_host:
                pending[place] = self._host.submit(spectral)
                continue
            for total in spectral:
                table[total.weight, total.column] = total.function(*total.matrices)
        return RankTotals(
            tables,
            pending,
            self.tap.agreement,
            sums.num_samples,
            batch_size,
            self.tap.stopwatch,
            geometries,
            updates.momentum_noise() if updates and self.settings.of_momentum else [],
        )

    def _finished(self, pending: Pending) -> list[Reading]:
        """Return the readings of a measurement, which its host threads are waited for."""
        if pending.totals is not None:
            readings = self._readings(pending.totals)
            pending.readings = [replace(reading, step=pending.step) for reading in readings]
            pending.totals = None
        assert pending.readings is not None
        return pending.readings

    @torch.no_grad()
    def _readings(self, totals: RankTotals) -> list[Reading]:
        """Join the ranks' totals: one all-reduce of kilobytes, and one wait for the device."""
        counts = {"batch_size": totals.batch_size, "num_samples": totals.num_samples}
        with totals.stopwatch.running():
            tables = [
                table + self._host.gathered(on_host, table) if on_host else table
                for table, on_host in zip(totals.tables, totals.on_host, strict=True)
            ]
            numbers = (1, totals.num_samples, totals.batch_size)
            squares = (number**2 for number in numbers)
            # Filled there: on a GPU the host waits for each number that it writes into a tensor.
            filled = [totals.agreement.new_full((1,), n) for n in (*numbers, *squares)]
            parts = [*(table.flatten() for table in tables), totals.agreement.flatten()]
            parts.append(torch.cat(filled))
            joined = reduce_over(torch.cat(parts), self.tap.layout)
        joined = joined.cpu()
        seconds = totals.stopwatch.seconds()
        *flat, agreement, of_ranks = joined.split([part.numel() for part in parts])
        check_ranks(of_ranks.tolist())
        self._check_agreement(agreement.view(-1, 2).tolist())
        readings = []
        for geometry, joint, table in zip(totals.geometries, flat, tables, strict=True):
            rows = joint.view(table.shape).tolist()  # [weight][column]
            if totals.momentum_noise:
                rows = [
                    geometry.with_noise_times(share, row, totals.num_samples)
                    for share, row in zip(totals.momentum_noise, rows, strict=True)
                ]
            weights = [i for i, w in enumerate(self.tap.weights) if geometry.looks_at(w.role)]
            whole = added(rows, weights)
            parts_of = {name: added(rows, some) for name, some in self._parts(weights).items()}
            for estimate in self.settings.estimates_of(geometry.name):
                total = geometry.measure(estimate, whole, **counts)
                of_parts = {
                    name: geometry.measure(estimate, part, **counts)
                    for name, part in parts_of.items()
                }
                readings.append(Reading(total, of_parts, seconds, geometry.details(whole)))
        return readings

    def _check_optimizer(self) -> None:
        """Raise InputError unless the optimizer has what is read of it."""
        updates, settings = self.tap.updates, self.settings
        if not settings.reads_optimizer:
            return
        if updates is None:
            reading = [geometry.name for geometry in self.geometries if geometry.reads_optimizer]
            what = f"geometries=[{reading[0]}]" if reading else "of_momentum=true"
            raise InputError(
                f"noise_scale.{what} reads the optimizer; give it to the meter as optimizer="
            )
        if not updates.has_weights:
            raise InputError(
                "the optimizer of the noise meter has none of the model's parameters; give it the "
                "optimizer that steps this model"
            )
        if settings.of_momentum and not updates.has_constant_momenta:
            raise InputError(
                "noise_scale.of_momentum=true reads one momentum of each parameter, an average "
                "whose weights stay, which this optimizer's betas are not; use of_momentum=false, "
                "or an optimizer such as adamw, signum or muon"
            )
        for geometry in self.geometries:
            geometry.check_training(updates.training)

    def _check_agreement(self, squares: list[list[float]]) -> None:
        """Raise InputError if the mean gradient of a weight is not the mean of its samples.

        Args:
            squares: of each weight, by `GradientTap`.
        """
        for tapped, (mean, difference) in zip(self.tap.weights, squares, strict=True):
            half = tapped.weight.dtype.itemsize < 4
            # Not finite: the readings say so themselves.
            if difference > (IN_HALF_PRECISION if half else DISAGREEMENT) ** 2 * mean:
                off = f"by {math.sqrt(difference / mean):.0%}" if mean else "in all"
                raise InputError(
                    f"meter.read: {tapped.name}.grad differs from the mean of the measured samples "
                    f"{off} of its norm; read after the last backward pass and before clipping, "
                    "unscaling or zero_grad, put every backward pass into meter.sample(), and zero "
                    "the gradients of all parameters after each step"
                )

    def _parts(self, weights: list[int]) -> dict[str, list[int]]:
        """Weights by kind and by block, as far as the settings ask for them."""
        parts: dict[str, list[int]] = {}
        for index in weights:
            weight = self.tap.weights[index]
            if self.settings.per_kind:
                parts.setdefault(self._kinds[weight.name], []).append(index)
            if self.settings.per_layer and weight.block[-1].isdigit():  # not embedding or output
                parts.setdefault(weight.block, []).append(index)
        return parts


def reading_from(values: dict[str, Any]) -> Reading:
    """Inverse of `dataclasses.asdict`."""
    total, *of_parts = (
        Measurement(**of | {"gains": tuple(of.get("gains", ()))})
        for of in (values["total"], *values["parts"].values())
    )
    parts = dict(zip(values["parts"], of_parts, strict=True))
    return Reading(**values | {"total": total, "parts": parts})


def check_ranks(sums: list[float]) -> None:
    """Raise InputError unless all ranks have as many samples and one batch size.

    Args:
        sums: over ranks, of 1, the samples, the batch size, and of their squares.
    """
    ranks = sums[0]
    for name, total, squares in zip(("samples", "batch_size"), sums[1:3], sums[4:6], strict=True):
        if ranks * squares != total**2:
            raise InputError(
                f"meter.read: ranks differ in their {name}, {total / ranks:g} on average; each "
                "rank takes as many samples of a step, and gives the batch size of all together"
            )


def added(table: list[list[float]], rows: list[int]) -> list[float]:
    return [sum(table[row][column] for row in rows) for column in range(len(table[0]))]
