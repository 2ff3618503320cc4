"""What a noise scale is in each geometry: one class each (arXiv:2602.03001, Sections 3 and 4.1).

`plug_in` is the paper's estimate, unchanged (Eq. 22); the others stand beside it.

    geometry   estimate      noise N                     signal M
    euclidean  plug_in       sum_i sigma_i^2             ||g||_2^2
    euclidean  debiased      sum_i sigma_i^2             ||g||_2^2 - N / B
    euclidean  cross_fitted  sum_i sigma_i^2             s |s|
    manhattan  plug_in       (sum_i sigma_i)^2           ||g||_1^2
    manhattan  debiased      (sum_i sigma_i)^2 / c4^2    ||g||_1^2
    manhattan  cross_fitted  (sum_i sigma_i)^2           s |s|
    nuclear    plug_in       (sum_l tr C_l^(1/2))^2      (sum_l ||G_l||_S1)^2
    nuclear    cross_fitted  (sum_l tr C_l^(1/2))^2      s |s|
    adam       as Euclidean, of gradients over Adam's v^(1/2) + epsilon
    composite  plug_in       matrices and the rest as the optimizer steps along them
    composite  cross_fitted  the same                    s |s|
    the first  nested        b a^2                       a^2, of the fitted progress curve

What each mends. E||g||_2^2 = ||true gradient||_2^2 + tr C / B: the Euclidean signal is read too
high, by all of it where noise dominates. E[root of a variance over R samples] = c4(R) * sigma: the
Manhattan noise is read too low. No such factor is known for tr C^(1/2), so Nuclear has no debiased
estimate. The cross-fitted s stands for the dual norm in all three geometries, and its noise is the
plug-in one. A single M of `debiased` or `cross_fitted` may be negative. It is kept that way: s |s|
gives s back, and only averages are clamped (`smoothing.py`).

`nested` reads no noise at all: it sees what steps of an eighth, a quarter and half of the samples
gain, and fits the curve of `progress_curve` to them. Its noise scale is that curve's bend, for
sgd's own normalized step the same as the other estimates' mean, and the gains themselves are part
of the measurement, since they may be averaged and a fit may not.

A new geometry is one class in this file: defining it with a `name` registers it, and
`noise_scale.geometries` and `batch_size.geometry` then accept that name.

Legend as in `equations.py`; W weights. No process groups, no configuration.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.square_root import default_mode, smaller_side_gram, trace_square_root
from gns_pretrain.model.roles import Role
from gns_pretrain.noise_scale.equations import (
    cross_grams,
    dual_norm_fraction_batch,
    dual_norm_goodput_batch,
    euclidean_cross_signal,
    euclidean_cross_totals,
    euclidean_fraction_batch,
    euclidean_goodput_batch,
    euclidean_noise,
    euclidean_part_totals,
    euclidean_signal_total,
    gram_covariance,
    inflection_batch,
    inflection_v1_batch,
    manhattan_cross_total,
    manhattan_noise_total,
    manhattan_part_total,
    manhattan_signal_total,
    maximum_efficiency_batch,
    noise_scale,
    nuclear_cross_total,
    nuclear_part_total,
    nuclear_totals,
    part_grams,
    progress_curve,
    small_sample_factor,
)
from gns_pretrain.noise_scale.sample_sums import NESTED_STRIDES, Needs, SampleSums, joined

# Of Grams whose roots are iterated together, 64 MiB in float64. 26 such tensors live at a time,
# beside the owned Grams and however many those are.
CHUNK_ENTRIES = 2**23

# What the record calls the gains of the parts by NESTED_STRIDES, and of a half.
GAINS = ("gain_eighth", "gain_quarter", "gain_half")

GEOMETRIES: dict[str, type["Geometry"]] = {}  # by name; filled by defining a subclass

# What settings and records call the target `inflection`: in older ones that name meant 64/9.
RECORDED_INFLECTION = "corrected_inflection"


def fewest_samples(estimates: Iterable[str]) -> int:
    """Samples of a step that these estimates need."""
    return max(NESTED_STRIDES) if "nested" in estimates else 2


@dataclass(frozen=True)
class Measurement:
    """Noise and signal of one optimizer step, for one geometry and estimate."""

    geometry: str  # a key of `GEOMETRIES`
    estimate: str  # one of its estimates
    noise: float  # N, of one sequence
    signal: float  # M; negative if a debiased or cross-fitted one came out so
    num_samples: int  # R
    batch_size: int  # B, sequences per optimizer step over all ranks
    # Of `nested`: s of an eighth, a quarter and half of the samples, in the unit of the dual norm.
    gains: tuple[float, ...] = ()

    @property
    def sizes(self) -> list[float]:
        """Sequences that the gains are those of."""
        return part_sizes(self.batch_size, self.num_samples)

    @property
    def noise_scale(self) -> float | None:
        """N / M in sequences (Eq. 22); None where the signal is not positive."""
        return noise_scale(self.noise, self.signal)

    @property
    def skip_reason(self) -> str | None:
        """Why this measurement must not enter an average; None if it may."""
        numbers = [("noise", self.noise), ("signal", self.signal)]
        if self.gains:  # of which the other two are a fit, whose noise may well be infinite
            numbers = [("gain", gain) for gain in self.gains]
        for name, value in numbers:
            if not math.isfinite(value):
                return f"{self.geometry} {name} is {value}"
        return None


@dataclass(frozen=True)
class SpectralTotal:
    """One of a weight's totals that takes eigenvalues: by LAPACK, one matrix at a time."""

    weight: int  # index
    column: int  # of `Geometry.columns`
    function: Callable[..., Tensor]  # of `matrices`; 0-dimensional, float64
    matrices: tuple[Tensor, ...]  # [s, s] each, float64, used by nothing else


@dataclass(frozen=True)
class Training:
    """How an optimizer trains each weight, as far as geometries ask; lists by weight."""

    is_matrix: list[bool]  # whether its role is MATRIX
    has_second_moments: list[bool]  # as Adam keeps them
    along_signs: list[bool]  # along matrix signs, by steps as long as the learning rate says


class GeometryChoices(Protocol):
    """What a geometry reads of `NoiseScaleSettings`."""

    read_after_steps: int
    parameters: str
    nuclear_parameters: str
    nuclear_local_batch_factor: bool
    composite_rest: str
    composite_sum: str
    square_root: str


class Geometry(ABC):
    """The noise scale of one geometry; a subclass with a name of its own is registered.

    The defaults are those of Manhattan and Nuclear: there N and M are squares of totals over
    weights, and the gain has Appendix B's points.
    """

    name: ClassVar[str]
    # The paper's first.
    estimates: ClassVar[tuple[str, ...]] = ("plug_in", "cross_fitted", "nested")
    # Of `totals`: gain is that of half the step.
    columns: ClassVar[tuple[str, ...]] = ("noise", "signal", "gain", "gain_eighth", "gain_quarter")
    reads_optimizer: ClassVar[bool] = False
    # Below this theta the plug-in target exceeds B where there is no true gradient at all, so that
    # a batch can grow from noise alone: the square root of what the scale then reads, over B. None
    # where it is not known.
    noise_alone_theta: ClassVar[float | None] = None
    noise_alone_estimates: ClassVar[tuple[str, ...]] = ("plug_in",)  # that noise alone raises
    # Batch sizes from a noise scale by batch_size.target, beside theta and kappa.
    targets: ClassVar[Mapping[str, Callable[[float], float]]] = {
        "inflection": inflection_batch,
        RECORDED_INFLECTION: inflection_batch,
        "inflection_v1": inflection_v1_batch,
        "maximum_efficiency": maximum_efficiency_batch,
    }
    fraction_batch = staticmethod(dual_norm_fraction_batch)  # target kappa
    goodput_batch = staticmethod(dual_norm_goodput_batch)  # policy goodput

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            GEOMETRIES[cls.name] = cls

    def __init__(self, settings: GeometryChoices) -> None:
        self.settings = settings

    @property
    def needs(self) -> Needs:
        """What its totals read beside norms and mean; `signed_sums` is added for cross_fitted."""
        return Needs()

    def looks_at(self, role: Role) -> bool:
        """Whether weights of this role are part of the noise scale."""
        roles = {"block_matrices": Role.MATRIX, "norms": Role.NORM}
        return role is roles.get(self.settings.parameters, role)

    @abstractmethod
    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """Return one rank's part of each weight's totals; they add up over weights and ranks.

        Returns:
            [W, columns], float64: by default the roots of N and of M, and the cross-fitted s. Zero
            for what `spectral_totals` has.
        """

    def spectral_totals(self, sums: SampleSums, batch_size: int) -> Iterator[SpectralTotal]:
        """Yield those totals that may be computed on the host, while the next steps train.

        An iterator, because the device then holds the matrices of one weight at a time.
        """
        return iter(())

    def check_training(self, training: Training) -> None:  # noqa: B027 most geometries read nothing
        """Raise InputError if the optimizer lacks what is read of it (`reads_optimizer`)."""

    def noise_and_signal(
        self, estimate: str, totals: Sequence[float], batch_size: int, num_samples: int
    ) -> tuple[float, float]:
        """Return N and M of an estimate, by the table at the top.

        Args:
            totals: `columns`, added over the weights in question and over all ranks.
        """
        noise, signal, gain, *_ = totals
        return noise**2, gain * abs(gain) if estimate == "cross_fitted" else signal**2

    def with_noise_times(
        self, factor: float, totals: Sequence[float], num_samples: int
    ) -> Sequence[float]:
        """Return a weight's `columns` with N as many times as large, and all else as it is."""
        noise, *others = totals
        return [noise * math.sqrt(factor), *others]

    def gains(self, totals: Sequence[float]) -> tuple[float, ...]:
        """Return s of an eighth, a quarter and half of the samples, from `columns` added up."""
        half, *parts = totals[2:5]
        return *parts, half

    def measure(
        self, estimate: str, totals: Sequence[float], *, batch_size: int, num_samples: int
    ) -> Measurement:
        """Return `noise_and_signal` as a measurement; InputError if `estimate` is not known."""
        if estimate not in self.estimates:
            raise InputError(
                f"noise_scale.estimates holds {estimate}, which geometry {self.name} does not "
                f"have; use one of {', '.join(self.estimates)}"
            )
        if estimate == "nested":
            gains = self.gains(totals)
            noise, signal = nested_noise_and_signal(part_sizes(batch_size, num_samples), gains)
            return Measurement(self.name, estimate, noise, signal, num_samples, batch_size, gains)
        noise, signal = self.noise_and_signal(estimate, totals, batch_size, num_samples)
        return Measurement(self.name, estimate, noise, signal, num_samples, batch_size)

    def details(self, totals: Sequence[float]) -> dict[str, Any]:
        """Further entries of the record's noise line; none by default."""
        return {}


class Euclidean(Geometry):
    """SGD's geometry (Eq. 6). Its signal is ||g||^2 itself, and its gain has no inflection."""

    name = "euclidean"
    estimates = ("plug_in", "debiased", "cross_fitted", "nested")
    columns = (
        *("sample_squares", "mean_squares", "product", "first_squares", "second_squares"),
        *("product_eighth", "squares_eighth", "product_quarter", "squares_quarter"),
    )
    noise_alone_theta = 1.0  # E||g||_2^2 = tr C / B, so that the scale reads B
    targets: ClassVar[Mapping[str, Callable[[float], float]]] = {}
    fraction_batch = staticmethod(euclidean_fraction_batch)
    goodput_batch = staticmethod(euclidean_goodput_batch)

    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """sum_j ||g^j||^2, ||g||^2; <g_A, g_B>, ||g_A||^2 and ||g_B||^2."""
        totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
        totals[:, 0] = sums.square_norms
        for rows in sums.row_groups():
            mean, sizes = joined(sums.means[rows])
            totals[rows, 1] = euclidean_signal_total(mean, sizes)
            if sums.signed:
                halves = sums.halves(mean, joined(sums.signed[rows])[0])
                totals[rows, 2:5] = euclidean_cross_totals(*halves, sizes)
            for column, (stride, nested) in zip((5, 7), sums.nested_rows(rows), strict=False):
                part = sums.part(stride, mean, nested)
                totals[rows, column : column + 2] = euclidean_part_totals(*part, sizes)
        return totals

    def noise_and_signal(
        self, estimate: str, totals: Sequence[float], batch_size: int, num_samples: int
    ) -> tuple[float, float]:
        """Eq. 20 summed over coordinates needs the samples' norms alone."""
        sample_squares, mean_squares, *cross = totals[:5]
        counts = {"batch_size": batch_size, "num_samples": num_samples}
        noise = euclidean_noise(sample_squares, mean_squares, **counts)
        if estimate == "cross_fitted":
            gain = euclidean_cross_signal(torch.tensor(cross)).item()
            return noise, gain * abs(gain)
        return noise, mean_squares - noise / batch_size if estimate == "debiased" else mean_squares

    def with_noise_times(
        self, factor: float, totals: Sequence[float], num_samples: int
    ) -> Sequence[float]:
        """N is a difference, whose first term moves."""
        sample_squares, mean_squares, *others = totals
        sample_squares = factor * sample_squares + (1.0 - factor) * num_samples * mean_squares
        return [sample_squares, mean_squares, *others]

    def gains(self, totals: Sequence[float]) -> tuple[float, ...]:
        """For p(g) = g / ||g||_2 over all coordinates together."""
        parts = [
            product / math.sqrt(square) if square > 0.0 else 0.0
            for product, square in (totals[5:7], totals[7:9])
        ]
        return *parts, euclidean_cross_signal(torch.tensor(totals[2:5])).item()


class Manhattan(Geometry):
    """The geometry of signSGD and Signum (Eq. 13)."""

    name = "manhattan"
    estimates = ("plug_in", "debiased", "cross_fitted", "nested")
    # E|g_i| = (2 / pi)^(1/2) sigma_i B^(-1/2), so that the scale reads (pi / 2) B (many samples).
    noise_alone_theta = math.sqrt(math.pi / 2.0)
    noise_alone_estimates = ("plug_in", "debiased")  # debiased mends the noise, not the signal

    @property
    def needs(self) -> Needs:
        """Squares of every coordinate."""
        return Needs(squares=True)

    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """sum_i sigma_i, ||g||_1 and s of the sign."""
        totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
        for rows in sums.row_groups():
            mean, sizes = joined(sums.means[rows])
            squares = joined(sums.squares[rows])[0]
            variance = sums.variance_of(squares, mean, batch_size=batch_size)
            totals[rows, 0] = manhattan_noise_total(variance, sizes)
            totals[rows, 1] = manhattan_signal_total(mean, sizes)
            if sums.signed:
                halves = sums.halves(mean, joined(sums.signed[rows])[0])
                totals[rows, 2] = manhattan_cross_total(*halves, sizes)
            for column, (stride, nested) in zip((3, 4), sums.nested_rows(rows), strict=False):
                part = sums.part(stride, mean, nested)
                totals[rows, column] = manhattan_part_total(*part, sizes)
        return totals

    def noise_and_signal(
        self, estimate: str, totals: Sequence[float], batch_size: int, num_samples: int
    ) -> tuple[float, float]:
        """Debiased, the noise is divided by c4^2."""
        noise, signal = super().noise_and_signal(estimate, totals, batch_size, num_samples)
        if estimate == "debiased":
            noise /= small_sample_factor(num_samples) ** 2
        return noise, signal


class Nuclear(Geometry):
    """The geometry of specSGD and Muon (Eq. 17), of matrices and not of the other weights."""

    name = "nuclear"
    columns = (*Geometry.columns, "fallbacks")
    # Between the other two, by shape: E||g||_S1 of a square matrix of independent entries is
    # 8 / (3 pi) of tr C^(1/2) B^(-1/2), that of a very wide one all of it.
    noise_alone_theta = 3.0 * math.pi / 8.0

    @property
    def needs(self) -> Needs:
        """Whole matrices and their Grams."""
        if self.settings.nuclear_parameters == "all_2d":
            return Needs(matrices=frozenset({Role.MATRIX, Role.EMBEDDING, Role.OUTPUT}))
        return Needs(matrices=frozenset({Role.MATRIX}))

    def looks_at(self, role: Role) -> bool:
        """Matrices inside the model; embedding and output too with nuclear_parameters=all_2d."""
        return role in self.needs.matrices

    def _takes_eigenvalues(self, device: torch.device) -> bool:
        """Whether square roots are taken by eigenvalues: read later, those cost the step less."""
        mode = self.settings.square_root
        if mode == "auto":
            mode = "exact" if self.settings.read_after_steps else default_mode(device)
        return mode == "exact"

    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """tr C^(1/2) and ||G||_S1 by iteration, or by eigenvalues where that is not proven."""
        totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
        if self._takes_eigenvalues(totals.device) or not sums.grams:
            return totals
        members, iterated = [], []
        for chunk in chunks_of_one_size(sums.grams):
            members += chunk
            iterated.append(
                nuclear_totals(
                    torch.stack([sums.grams[i] for i in chunk]) / sums.num_samples,
                    torch.stack([smaller_side_gram(sums.matrices[i].double()) for i in chunk]),
                    batch_size=batch_size,
                    num_samples=sums.num_samples,
                )
            )
        values, proven = (torch.cat(each, dim=1) for each in zip(*iterated, strict=True))
        # One place at a time: a list as an index would be copied to the device, and waited for.
        places = [totals[i, column] for column in (0, 1) for i in members]
        torch._foreach_copy_(places, list(values.flatten().unbind()))
        for column, of_column in enumerate(proven.tolist()):  # the device is waited for once
            for i, is_proven in zip(members, of_column, strict=True):
                if not is_proven:
                    totals[i, column] = exact_trace(self._grams(sums, i, batch_size)[column])
                    totals[i, -1] += 1
        return totals

    def _grams(self, sums: SampleSums, index: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """C and G G^T of one matrix, whose square roots' traces are noise and signal."""
        gram_of_mean = smaller_side_gram(sums.matrices[index].double())
        covariance = gram_covariance(
            sums.grams[index] / sums.num_samples,
            gram_of_mean,
            batch_size=batch_size,
            num_samples=sums.num_samples,
        )
        return covariance, gram_of_mean

    def spectral_totals(self, sums: SampleSums, batch_size: int) -> Iterator[SpectralTotal]:
        """s of the matrix sign; and tr C^(1/2) and ||G||_S1 by eigenvalues."""
        takes_eigenvalues = self._takes_eigenvalues(sums.square_norms.device)
        for index, mean in sums.matrices.items():
            # First, because it takes longest.
            if index in sums.signed_matrices:
                halves = sums.halves(mean, sums.signed_matrices[index])
                yield SpectralTotal(index, 2, nuclear_cross_total, cross_grams(*halves))
            nested = zip((3, 4), NESTED_STRIDES, sums.nested_matrices, strict=False)
            for column, stride, matrices in nested:
                part = sums.part(stride, mean, matrices[index])
                yield SpectralTotal(index, column, nuclear_part_total, part_grams(*part))
            if takes_eigenvalues:
                for column, gram in enumerate(self._grams(sums, index, batch_size)):
                    yield SpectralTotal(index, column, exact_trace, (gram,))

    def noise_and_signal(
        self, estimate: str, totals: Sequence[float], batch_size: int, num_samples: int
    ) -> tuple[float, float]:
        """The authors' code multiplies the noise scale by the local batch size, on request."""
        noise, signal = super().noise_and_signal(estimate, totals, batch_size, num_samples)
        if self.settings.nuclear_local_batch_factor:
            noise = noise * batch_size / num_samples
        return noise, signal

    def details(self, totals: Sequence[float]) -> dict[str, Any]:
        """How many square roots took the slow route, if any: a GPU pays for those."""
        fallbacks = round(totals[-1])
        return {"square_root_fallbacks": fallbacks} if fallbacks else {}


class Adam(Euclidean):
    """The geometry of Adam's own step, as AdamScale has it (AdaptDL, PR 95).

    Gradients are divided by the v^(1/2) + epsilon that the coming step divides by. It has the mean
    gradient's square in it, with a weight of 1 - beta2: without it the rows of an embedding that no
    step has seen for long, whose v is near zero, would be all of noise and signal. Weights that
    Adam does not train add nothing.
    """

    name = "adam"
    reads_optimizer = True

    @property
    def needs(self) -> Needs:
        """Squares of every coordinate, which come to this rank as its scales do."""
        return Needs(squares=True, second_moments=True)

    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """The Euclidean totals of scaled gradients."""
        totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
        for weights, scaled in sums.over_scales():
            put(totals, weights, super().totals(scaled, batch_size))
        return totals

    def check_training(self, training: Training) -> None:
        """Some weight has to have second moments."""
        if not any(training.has_second_moments):
            raise InputError(
                "noise_scale.geometries=[adam] divides by the second moments that Adam and AdamW "
                "keep, and this optimizer has none; use optimizer=adamw, or another geometry"
            )


class Composite(Geometry):
    """Of an optimizer with a rule for matrices and another for the rest (docs/noise_scale.md).

    The step of part k is eta_k long in its own norm, which makes the whole a step of steepest
    descent under max_k ||x_k||_k / eta_k. Lemma 3.1 for that norm, whose dual is a sum,

        sum_k eta_k E<gradient_k, p_k> >= sum_k eta_k (M_k^(1/2) - (N_k / B)^(1/2))

    is one geometry's with N^(1/2) = sum_k eta_k N_k^(1/2) and M^(1/2) = sum_k eta_k M_k^(1/2).
    Under the norm (sum_k (||x_k||_k / eta_k)^2)^(1/2) squares add up in their place
    (composite_sum=squares). M^(1/2) is in nats a step.

    Matrices are in the nuclear geometry, a weight's eta its peak rate times its rule's scaling. The
    rest is in the Manhattan one; or with composite_rest=adam eta_k M_k^(1/2) is what Adam's step
    gains, eta sum_i g_i^2 / (v_i^(1/2) + epsilon), and N_k / M_k the adam scale of the rest.
    """

    name = "composite"
    estimates = ("plug_in", "cross_fitted")
    columns = (
        *("noise", "signal", "gain", "rest_noise", "rest_signal", "rest_gain"),
        *("sample_squares", "mean_squares", "fallbacks"),
    )
    reads_optimizer = True

    def __init__(self, settings: GeometryChoices) -> None:
        super().__init__(settings)
        self._nuclear, self._manhattan = Nuclear(settings), Manhattan(settings)
        self._euclidean = Euclidean(settings)
        self._rest_is_adams = settings.composite_rest == "adam"

    @property
    def needs(self) -> Needs:
        """Those of both parts."""
        return Needs(
            squares=True,
            matrices=frozenset({Role.MATRIX}),
            second_moments=self._rest_is_adams,
            lengths=True,
        )

    def looks_at(self, role: Role) -> bool:
        """All weights, since the optimizer steps all of them."""
        return True

    def totals(self, sums: SampleSums, batch_size: int) -> Tensor:
        """Each part's roots and gains, times its weights' lengths."""
        totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
        nuclear = self._nuclear.totals(sums, batch_size)
        totals[:, 0:3], totals[:, -1] = nuclear[:, 0:3], nuclear[:, -1]
        if self._rest_is_adams:
            for weights, scaled in sums.over_scales(0.5):
                put(totals[:, 4:6], weights, self._euclidean.totals(scaled, batch_size)[:, 1:3])
            for weights, scaled in sums.over_scales():
                put(totals[:, 6:8], weights, self._euclidean.totals(scaled, batch_size)[:, 0:2])
        elif rest := [i for i, is_matrix in enumerate(sums.is_matrix) if not is_matrix]:
            manhattan = self._manhattan.totals(sums.only(rest), batch_size)
            put(totals[:, 3:6], rest, manhattan[:, 0:3])
        # Factors as numbers: on a GPU the host waits for each tensor that it fills.
        of_matrices = [n * part for n, part in zip(sums.lengths, sums.is_matrix, strict=True)]
        torch._foreach_mul_(list(totals[:, 0:3].unbind()), of_matrices)
        torch._foreach_mul_(list(totals[:, 3:6].unbind()), sums.lengths)
        return totals

    def check_training(self, training: Training) -> None:
        """Matrices go along signs and nothing else does; the rest may have to be Adam's."""
        if not any(training.is_matrix) or training.along_signs != training.is_matrix:
            raise InputError(
                "noise_scale.geometries=[composite] is of steps along matrix signs beside a rule "
                "for the rest, which this optimizer does not take for every matrix and for "
                "nothing else; use optimizer=muon or specsgd, or the geometry adam or manhattan"
            )
        known = zip(training.has_second_moments, training.is_matrix, strict=True)
        if self._rest_is_adams and not all(moments or matrix for moments, matrix in known):
            raise InputError(
                "noise_scale.composite_rest=adam divides by the second moments that Adam and AdamW "
                "keep, and some weights beside the matrices have none; use composite_rest=manhattan"
            )

    def spectral_totals(self, sums: SampleSums, batch_size: int) -> Iterator[SpectralTotal]:
        """Those of the nuclear geometry, times each matrix's length."""
        for total in self._nuclear.spectral_totals(sums, batch_size):
            if sums.is_matrix[total.weight] and total.column < 3:
                length = sums.lengths[total.weight]
                yield replace(total, function=partial(times, length, total.function))

    def noise_and_signal(
        self, estimate: str, totals: Sequence[float], batch_size: int, num_samples: int
    ) -> tuple[float, float]:
        """Both parts together, by composite_sum."""
        noise, signal, gain, rest_noise, rest_signal, rest_gain = totals[:6]
        if self._rest_is_adams and rest_signal:
            counts = {"batch_size": batch_size, "num_samples": num_samples}
            scale = euclidean_noise(totals[6], totals[7], **counts) / totals[7]
            rest_noise = rest_signal * math.sqrt(scale)
        if self.settings.composite_sum == "squares":
            if estimate == "cross_fitted":
                return noise**2 + rest_noise**2, gain * abs(gain) + rest_gain * abs(rest_gain)
            return noise**2 + rest_noise**2, signal**2 + rest_signal**2
        together = (noise + rest_noise, signal + rest_signal, gain + rest_gain)
        return super().noise_and_signal(estimate, together, batch_size, num_samples)

    def with_noise_times(
        self, factor: float, totals: Sequence[float], num_samples: int
    ) -> Sequence[float]:
        """Of both parts."""
        matrices, rest = (
            self._manhattan.with_noise_times(factor, part, num_samples)
            for part in (totals[0:3], totals[3:6])
        )
        squares = self._euclidean.with_noise_times(factor, totals[6:8], num_samples)
        return [*matrices, *rest, *squares, totals[-1]]

    def details(self, totals: Sequence[float]) -> dict[str, Any]:
        """As of the nuclear geometry."""
        return self._nuclear.details(totals)


def put(totals: Tensor, rows: Sequence[int], found: Tensor) -> None:
    """Copy [k, columns] to rows of [W, columns]: a list as an index would be waited for."""
    torch._foreach_copy_([totals[i] for i in rows], list(found.unbind()))


def times(factor: float, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return factor * function(*arguments)


def nested_noise_and_signal(sizes: Sequence[float], gains: Sequence[float]) -> tuple[float, float]:
    """N = b a^2 and M = a^2 of the progress curve through gains at these sizes, in sequences.

    Returns:
        N is inf where the gains show no bend, and 0 with M where they have no positive mean.
    """
    a, bend = progress_curve(sizes, gains)
    return (bend * a**2, a**2) if a > 0.0 else (0.0, 0.0)


def part_sizes(batch_size: int, num_samples: int) -> list[float]:
    """Sequences of an eighth, a quarter and half of the samples."""
    counts = [-(-num_samples // stride) for stride in NESTED_STRIDES]
    return [*(count / num_samples * batch_size for count in counts), batch_size / 2]


def exact_trace(gram: Tensor) -> Tensor:
    """tr C^(1/2) of one matrix."""
    return trace_square_root(gram[None], mode="exact").values[0]


def chunks_of_one_size(grams: dict[int, Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one size, as many as `CHUNK_ENTRIES` holds and at least one."""
    sizes: dict[int, list[int]] = {}
    for index, gram in grams.items():
        sizes.setdefault(len(gram), []).append(index)
    for size, members in sizes.items():
        count = max(1, CHUNK_ENTRIES // size**2)
        for start in range(0, len(members), count):
            yield members[start : start + count]
