"""Each sample's own gradient, tapped beside the gradient's own reduction.

A sample is what the backward pass of one micro-batch leaves on one data-parallel rank. On a
measured step a hook on every weight sees that sample's gradient before accumulation and before any
reduction, on one process, DDP, FSDP2, HSDP and tensor parallel alike; it changes nothing, so a
measured step trains with the same bits as an unmeasured one, and once removed it costs nothing.
What the estimators need of all samples is reduced at once, a block at a time, with few kernels and
collectives: its weights are neighbours in one flat tensor.

    squares, signed gradients   one reduce-scatter: every rank keeps its own rows, P / R floats each
    nested sums                 two more such rows in it
    Grams of the smaller side   one reduction to each rank that owns matrices of the block

After the last backward pass `GradientTap.sums` adds the mean gradient, which is the optimizer's own
before clipping: rows stay where they are, whole matrices go to their owners.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.norms import norms
from gns_pretrain.geometry.square_root import add_smaller_side_gram
from gns_pretrain.model.roles import (
    Labels,
    MatrixChoice,
    Role,
    matrix_shape,
    named_trainable,
)
from gns_pretrain.noise_scale.sample_sums import NESTED_STRIDES, Needs, SampleSums
from gns_pretrain.noise_scale.stopwatch import Stopwatch
from gns_pretrain.noise_scale.updates import Updates
from gns_pretrain.noise_scale.weights import (
    TappedWeight,
    owned_matrices,
    owned_means,
    tapped_weights,
)
from gns_pretrain.parallel.collectives import reduce_over
from gns_pretrain.parallel.sharding import ShardLayout, packed, unsharded_weights

PROBE_ENTRIES = 2**10  # of each weight that are summed over samples to check the mean gradient


class GradientTap:
    """Gathers what the samples of one step have in common and in what they differ.

    Args:
        model: parallelized; see `NoiseMeter`.
        needs: what is gathered.
        matrices, blocks: overrule the default roles and blocks of the weights.
        roles: of the weights that are measured; others are left alone.
        optimizer: has the second moments and the step lengths, where those are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        needs: Needs,
        matrices: MatrixChoice | None = None,
        blocks: Labels | Sequence[str] | None = None,
        *,
        roles: Container[Role] = frozenset(Role),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        seen = unsharded_weights(model)
        self.layout = ShardLayout.of_model(model, seen)
        if needs != Needs():  # reduced during the backward pass, beside the gradient's own traffic
            self.layout = self.layout.apart(next(iter(seen.values())).device)
        self.needs = needs
        weights = tapped_weights(model, self.layout, seen, needs.matrices, matrices, blocks)
        self._trainable = {w.name: (w.weight, w.seen) for w in weights}
        self.weights = [tapped for tapped in weights if tapped.role in roles]
        if not self.weights:
            raise InputError(
                "noise_scale.parameters leaves no weight of this model to measure; use all, or a "
                "geometry that reads what the model has"
            )
        self.updates = Updates(optimizer, self.weights) if optimizer is not None else None
        self.device = self.weights[0].weight.device
        self._widths = [tapped.padded_rows for tapped in self.weights]
        self.square_norms: Tensor  # [weights], float64; this rank's samples, summed
        # Own rows of all weights, summed over all samples: squares and sums of gradients.
        self.rows: Tensor  # [statistics, sum of padded_rows], float32
        self.squares: list[Tensor] = []  # views of it, by weight
        self.signed_sums: list[Tensor] = []  # likewise; +1 and -1 by the sample's parity
        self.nested_sums: list[list[Tensor]] = []  # likewise, of every so-manieth sample, by stride
        self.grams: dict[int, Tensor] = {}  # whole, of the weights this rank owns, all samples
        self.agreement: Tensor  # [weights, 2], float64; see `_agreement`
        self.stopwatch = Stopwatch(self.device)  # of this step
        self.armed = False
        # Blocks are reduced in one order on every rank: at first the reverse of the model's own,
        # after the first measured sample that in which gradients were complete.
        counts = Counter(tapped.block for tapped in self.weights)  # which are neighbours
        stops = list(accumulate(counts.values(), initial=0))
        self._order_blocks([range(*ends) for ends in pairwise(stops)][::-1])
        self._order_is_known = False
        self._completed: list[int] = []  # blocks of this sample, in the order of their gradients
        self.waiting: dict[int, dict[int, Tensor]] = {}  # gradients of blocks not yet reduced
        self._reduced = 0  # blocks of this sample
        self._in_sample = False
        self._first_round = 0
        self._rounds = 0  # samples of this rank
        self._probes: list[Tensor] = []  # first rows of each weight, flat, summed over own samples
        self._under_way: list[tuple[dist.Work, Callable[[], object]]] = []

    def _order_blocks(self, blocks: list[range]) -> None:
        self.blocks = blocks  # indices of weights, in the order in which blocks are reduced
        self._position = {i: place for place, members in enumerate(blocks) for i in members}

    @contextmanager
    def listening(self, *, first_round: int = 0) -> Iterator[None]:
        """Listen during the backward passes of one step.

        Args:
            first_round: samples of each rank that came before, of the same batch.
        """
        self._check_weights()
        self._first_round = first_round
        self._rounds = 0
        self.stopwatch = Stopwatch(self.device)
        self.square_norms = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        self._make_rows()
        self.grams = {}
        sizes = [probe_of(w, w.part_on_meta()).numel() for w in self.weights]
        self._probes = list(torch.zeros(sum(sizes), device=self.device).split(sizes))
        self.waiting.clear()
        self._completed.clear()
        self._under_way.clear()
        self._reduced = 0
        handles = [
            tapped.seen.register_hook(lambda gradient, i=index: self._see(i, gradient))
            for index, tapped in enumerate(self.weights)
        ]
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            for handle in handles:
                handle.remove()

    def _check_weights(self) -> None:
        """Raise InputError unless the model's trainable parameters are still those tapped."""
        # FSDP2 shows its unsharded copies between a forward and a backward pass.
        known = self._trainable
        now = dict(named_trainable(self.model))
        for name in (*now, *known):
            if not any(now.get(name) is weight for weight in known.get(name, ())):
                raise InputError(
                    f"{name} is not the trainable parameter that it was when the noise meter was "
                    "made; make another meter after sharding the model and after replacing, "
                    "freezing or unfreezing parameters"
                )

    @contextmanager
    def sample(self) -> Iterator[None]:
        """Take the backward pass of this block as one sample."""
        if self._in_sample:
            raise InputError(
                "one sample was begun within another; a sample is one micro-batch: its forward and "
                "backward pass"
            )
        self._in_sample = True
        try:
            yield
            with torch.no_grad(), self.measuring():
                self._end_of_sample()
        finally:
            self._in_sample = False

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time as the measurement's, and name it for the profiler."""
        with self.stopwatch.running(), record_function("measurement"):
            yield

    def _make_rows(self) -> None:
        """Zeros for this rank's rows of every weight, padded to the widest rank's."""
        statistics = self.needs.squares + len(self._signs(0))
        self.rows = torch.zeros(statistics, sum(self._widths), device=self.device)
        by_weight = [list(row.split(self._widths)) for row in self.rows]
        self.squares = by_weight.pop(0) if self.needs.squares else []
        self.signed_sums = by_weight.pop(0) if self.needs.signed_sums else []
        self.nested_sums = by_weight

    @torch.no_grad()
    def _see(self, index: int, gradient: Tensor) -> None:
        """The hook: keep a sample's gradient until its block is complete, then reduce the block."""
        if not self._in_sample:
            raise InputError(
                "a backward pass of a measured step ran outside meter.sample(); put each "
                "micro-batch's forward and backward pass into one `with meter.sample():`"
            )
        if gradient.is_sparse:
            raise InputError(
                f"{self.weights[index].name} has a sparse gradient, which the noise scale does not "
                "take; use sparse=False"
            )
        position = self._position[index]
        if position < self._reduced:
            raise InputError(
                f"{self.weights[index].name} got a second gradient in one sample; a sample takes "
                "one backward pass: add losses up before it. A weight that several segments of a "
                "reentrant activation checkpoint share needs use_reentrant=False"
            )
        arrived = self.waiting.setdefault(position, {})
        if self.weights[index].seen is not self.weights[index].weight:
            # FSDP2 only reads the gradient that autograd leaves in its copy: an alias serves, where
            # autograd would clone a gradient that another holds.
            gradient = gradient.detach()
        arrived[index] = arrived[index] + gradient if index in arrived else gradient
        if len(arrived) < len(self.blocks[position]):
            return
        self._completed.append(position)
        with self.measuring():  # within "backward", where autograd calls the hook
            while len(self.waiting.get(self._reduced, ())) == len(self.blocks[self._reduced]):
                self._reduce_next()
                if self._reduced == len(self.blocks):
                    break

    def _end_of_sample(self) -> None:
        """Reduce blocks in which some weight took no gradient; learn the order of the others."""
        several = self.layout.num_data_ranks * self.layout.num_parts > 1
        while self._reduced < len(self.blocks):
            arrived = self.waiting.setdefault(self._reduced, {})
            if several:  # other ranks may have what this one lacks
                for index in self.blocks[self._reduced]:
                    if index not in arrived:
                        shape = self.weights[index].part_shape
                        arrived[index] = torch.zeros(shape, device=self.device)
            self._reduce_next()
        self._finish()
        self._reduced = 0
        self._rounds += 1
        if not self._order_is_known:
            self._order_is_known = True
            order = [len(self.blocks)] * len(self.blocks)
            for place, position in enumerate(self._completed):
                order[position] = place
            places = torch.tensor(order, device=self.device)
            reduce_over(places, self.layout, dist.ReduceOp.MAX)
            self._order_blocks([self.blocks[p] for p in places.argsort(stable=True).tolist()])
        self._completed.clear()

    def _reduce_next(self) -> None:
        """Add one sample's gradients of the next block to the sums, over all ranks."""
        # The previous block's traffic runs under this block's backward pass, no longer.
        self._finish()
        gradients = self.waiting.pop(self._reduced)
        self._reduced += 1
        members = sorted(gradients)
        if not members:
            return
        samples = {i: self.weights[i].part_of(gradients[i]) for i in members}
        probes = [probe_of(self.weights[i], sample).flatten() for i, sample in samples.items()]
        probes = list(torch.cat(probes).float().split([len(probe) for probe in probes]))
        torch._foreach_add_([self._probes[i] for i in members], probes)
        squared = norms(list(samples.values())).double().square()
        # One place at a time: a list as an index would be copied to the device, and waited for.
        torch._foreach_add_([self.square_norms[i] for i in members], list(squared.unbind()))
        if len(self.rows):
            self._add_rows(samples)
        self._add_grams(gradients, samples)

    @property
    def _index_of_sample(self) -> int:
        """Of the current sample, in the batch: sample j belongs to rank j % num_data_ranks."""
        done = self._first_round + self._rounds
        return done * self.layout.num_data_ranks + self.layout.data_rank

    def _signs(self, sample: int) -> list[float]:
        """Of a sample's gradient in each sum of gradients; its index is that in the batch."""
        signed = [1.0 if sample % 2 == 0 else -1.0] * self.needs.signed_sums
        nested = NESTED_STRIDES if self.needs.nested_sums else ()
        return [*signed, *(float(sample % stride == 0) for stride in nested)]

    def _add_rows(self, samples: dict[int, Tensor]) -> None:
        """Add squares and signed gradients of one block to this rank's rows, over all ranks."""
        signs = self._signs(self._index_of_sample)
        whole = [self.weights[i].rows_first(sample) for i, sample in samples.items()]
        if self.layout.shard_group is None:
            flat = [tensor.reshape(-1).float() for tensor in whole]
            if self.squares:
                torch._foreach_addcmul_([self.squares[i] for i in samples], flat, flat)
            sums = [self.signed_sums] * self.needs.signed_sums + self.nested_sums
            for sign, of_weights in zip(signs, sums, strict=True):
                if sign:
                    torch._foreach_add_([of_weights[i] for i in samples], flat, alpha=sign)
            return
        sent = packed(whole, self.layout.num_shards)
        if len(self.rows) > 1:
            every = sent.new_empty(len(sent), len(self.rows), sent.shape[1])
            if self.squares:
                torch.mul(sent, sent, out=every[:, 0])
            for row, sign in enumerate(signs, len(self.rows) - len(signs)):
                torch.mul(sent, sign, out=every[:, row])
            sent = every
        elif self.squares:
            sent.square_()
        else:
            sent.mul_(signs[0])
        # All of a block have come, with zeros for those without a gradient; they are neighbours.
        start = sum(self._widths[: min(samples)])
        own = self.rows[:, start : start + sent.shape[-1]]
        received = torch.empty_like(own, memory_format=torch.contiguous_format)
        # torch 2.13 deprecates the older name, which is the only one that 2.11 has.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = scatter(
            received.flatten(), sent.flatten(), group=self.layout.shard_group, async_op=True
        )
        self._under_way.append((work, lambda: own.add_(received)))

    def _add_grams(self, gradients: dict[int, Tensor], samples: dict[int, Tensor]) -> None:
        """Add the Grams of one block to those of their owners, one flat tensor to each of them."""
        owners: dict[int, list[int]] = {}  # data-parallel ranks; of the Grams that this part makes
        for i in samples:
            if (owner := self.weights[i].owner) is not None and owner[1] == self.layout.part:
                owners.setdefault(owner[0], []).append(i)
        group = self.layout.data_group
        grams = self.grams if group is None else {}
        flats: dict[int, Tensor] = {}
        for data_rank, members in owners.items():
            new = [i for i in members if i not in grams]
            sides = [min(matrix_shape(self.weights[i].weight)) for i in new]
            # float64: where a sample has fewer tokens than the matrix is wide, float32 rounding
            # fills the null space, and a square root makes 1e-3 of 1e-7.
            areas = [side**2 for side in sides]
            flats[data_rank] = torch.zeros(sum(areas), dtype=torch.float64, device=self.device)
            views = flats[data_rank].split(areas)
            grams |= {i: v.view(n, n) for i, v, n in zip(new, views, sides, strict=True)}
        for i, sample in samples.items():
            tapped = self.weights[i]
            gradient = gradients[i]
            if tapped.owner is not None and tapped.in_parts and isinstance(gradient, DTensor):
                sample = gradient.full_tensor()
            if i in grams:
                matrix = sample.reshape(matrix_shape(tapped.weight))
                add_smaller_side_gram(grams[i], matrix.double())
        if group is None:
            return
        for data_rank, members in owners.items():
            flat = flats[data_rank]
            work = dist.reduce(flat, group=group, group_dst=data_rank, async_op=True)
            assert work is not None
            keep = partial(self._keep_grams, data_rank, {i: grams[i] for i in members})
            self._under_way.append((work, keep))

    def _keep_grams(self, data_rank: int, grams: dict[int, Tensor]) -> None:
        """Add the reduced Grams of one sample to those before it, on their owner."""
        if data_rank != self.layout.data_rank:
            return
        if grams.keys() <= self.grams.keys():
            torch._foreach_add_([self.grams[i] for i in grams], list(grams.values()))
        else:
            self.grams |= grams

    def _finish(self) -> None:
        for work, action in self._under_way:
            work.wait()
            action()
        self._under_way.clear()

    def release(self) -> None:
        """Free the sums once they have been read."""
        self.rows = torch.empty(0, 0)
        self.squares, self.signed_sums, self.grams, self._probes = [], [], {}, []
        self.nested_sums = []

    def sums(self, *, loss_scale: float = 1.0) -> SampleSums:
        """Return what the samples left on this rank; all ranks together, before clipping.

        Args:
            loss_scale: by which the loss was multiplied (torch.amp.GradScaler); gradients are
                divided by it.
        """
        self.agreement = self._agreement()
        if self.layout.replica_group is not None and len(self.rows):
            dist.all_reduce(self.rows, group=self.layout.replica_group)
        # A sample's loss was divided by the rank's number of samples, so that gradients add up to
        # a mean.
        scale = self._rounds / loss_scale
        factors = [scale**2] * self.needs.squares + [scale] * len(self._signs(0))
        for rows, factor in zip(self.rows, factors, strict=True):
            rows *= factor
        torch._foreach_mul_([*self.grams.values(), self.square_norms], scale**2)
        # Equal shard groups hold equal rows, of which only the first group's are counted, and of
        # weights that tensor-parallel ranks have whole only the first rank's.
        counts = [
            self.layout.replica == 0 and (w.in_parts or self.layout.part == 0) for w in self.weights
        ]
        means = []
        for index, (tapped, counted) in enumerate(zip(self.weights, counts, strict=True)):
            rows = tapped.mean_rows(loss_scale)
            means.append(rows if counted else rows[:0])
            if self.layout.part > 0 and not tapped.in_parts:
                self.square_norms[index].zero_()
        matrices, signed_matrices, nested_matrices = {}, {}, []
        updates = self.updates
        if self.needs.matrices:
            matrices = owned_means(self.weights, loss_scale)
            if self.needs.signed_sums:
                signed_matrices = self._owned(self.signed_sums)
            nested_matrices = [self._owned(sums) for sums in self.nested_sums]
        first = self._first_round * self.layout.num_data_ranks
        num_samples = self._rounds * self.layout.num_data_ranks
        num_even = len(range(first + first % 2, first + num_samples, 2))
        return SampleSums(
            num_even=num_even,
            num_odd=num_samples - num_even,
            square_norms=self.square_norms,
            means=means,
            squares=without_padding(self.squares, means),
            signed=without_padding(self.signed_sums, means),
            grams={
                i: self.grams[i] if i in self.grams else zero_gram(matrices[i]) for i in matrices
            },
            matrices=matrices,
            signed_matrices=signed_matrices,
            nested=[without_padding(sums, means) for sums in self.nested_sums],
            nested_matrices=nested_matrices,
            is_matrix=[tapped.role is Role.MATRIX for tapped in self.weights],
            scales=updates.scales(means) if updates and self.needs.second_moments else {},
            lengths=updates.lengths() if updates and self.needs.lengths else [],
        )

    def _owned(self, sums: list[Tensor]) -> dict[int, Tensor]:
        """Return the whole matrices that this rank owns of sums by weight; all ranks together."""
        shards = {
            i: tapped.shard_from_rows(sums[i])
            for i, tapped in enumerate(self.weights)
            if tapped.owner is not None
        }
        return owned_matrices(self.weights, shards)

    def _agreement(self) -> Tensor:
        """Return squared norms of the mean gradient, and of its difference to the samples' mean.

        They are equal but for rounding if every backward pass was a sample, nothing was in `.grad`
        before, and nothing has clipped or scaled it since.

        Returns:
            [weights, 2], float64; of this rank's rows among the first few of each weight, to be
            added over ranks.
        """
        flat = torch.cat(self._probes)
        if self.layout.data_group is not None:
            dist.all_reduce(flat, group=self.layout.data_group)
        flat /= self.layout.num_data_ranks
        probes = flat.split([probe.numel() for probe in self._probes])
        means, expected = [], []
        for tapped, entries in zip(self.weights, probes, strict=True):
            shape = probe_of(tapped, tapped.part_on_meta()).shape
            own = self.layout.rows_of(self.layout.shard, tapped.part_shape[tapped.row_dim])
            expected.append(entries.view(shape)[own])  # of the first rows, this rank's
            means.append(tapped.mean_rows(1.0)[: len(expected[-1])])
        differences = torch._foreach_sub(expected, means)
        return norms([*means, *differences]).double().square().view(2, -1).T


def probe_of(tapped: TappedWeight, part: Tensor) -> Tensor:
    """Return the first rows of a tensor of a weight's part: a few entries, one row at least."""
    rows = tapped.rows_first(part)
    return rows[: max(1, PROBE_ENTRIES // max(1, rows.shape[1:].numel()))]


def without_padding(flat: list[Tensor], means: list[Tensor]) -> list[Tensor]:
    """Sums of the weights' rows, in the rows' shapes; none where there are no sums."""
    return [part[: mean.numel()].view_as(mean) for part, mean in zip(flat, means, strict=False)]


def zero_gram(matrix: Tensor) -> Tensor:
    """The Gram of a matrix that no sample reached."""
    side = min(matrix.shape)
    return matrix.new_zeros(side, side, dtype=torch.float64)
