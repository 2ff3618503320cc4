"""Each sample's own gradient, tapped beside the gradient's own reduction.

A sample is what the backward pass of one micro-batch leaves on one data-parallel rank. On a
measured step a hook on every weight sees that sample's gradient before accumulation and before any
reduction, on one process, DDP, FSDP2, HSDP and tensor parallel alike; it changes nothing, so a
measured step trains with the same bits as an unmeasured one, and once removed it costs nothing.
What the estimators need of all samples is reduced at once, a block at a time:

    squares, signed gradients   reduce-scattered: every rank keeps its own rows, P / R floats each
    Grams of the smaller side   reduced to the one rank that owns the matrix

After the last backward pass `GradientTap.sums` adds the mean gradient, which is the optimizer's own
before clipping: rows stay where they are, whole matrices go to their owners.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from gns_pretrain.errors import InputError
from gns_pretrain.geometry.norms import norms
from gns_pretrain.geometry.square_root import smaller_side_gram
from gns_pretrain.model.roles import Labels, MatrixChoice, matrix_shape, named_trainable
from gns_pretrain.noise_scale.geometries import Needs, SampleSums
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
    """

    def __init__(
        self,
        model: nn.Module,
        needs: Needs,
        matrices: MatrixChoice | None = None,
        blocks: Labels | Sequence[str] | None = None,
    ) -> None:
        self.model = model
        seen = unsharded_weights(model)
        self.layout = ShardLayout.of_model(model, seen)
        self.needs = needs
        self.weights = tapped_weights(model, self.layout, seen, needs.matrices, matrices, blocks)
        self.device = self.weights[0].weight.device
        self.square_norms: Tensor  # [weights], float64; this rank's samples, summed
        self.squares: list[Tensor] = []  # own rows of each weight, flat, summed over all samples
        self.signed_sums: list[Tensor] = []  # likewise, with +1 and -1 by the sample's parity
        self.grams: dict[int, Tensor] = {}  # whole, of the weights this rank owns, all samples
        self.agreement: Tensor  # [weights, 2], float64; see `_agreement`
        self.seconds = 0.0  # host time spent on this step
        self.armed = False
        # Blocks are reduced in one order on every rank: at first the reverse of the model's own,
        # after the first measured sample that in which gradients were complete.
        members: dict[str, list[int]] = {}
        for index, tapped in enumerate(self.weights):
            members.setdefault(tapped.block, []).append(index)
        self._order_blocks(list(reversed(members.values())))
        self._order_is_known = False
        self._completed: list[int] = []  # blocks of this sample, in the order of their gradients
        self.waiting: dict[int, dict[int, Tensor]] = {}  # gradients of blocks not yet reduced
        self._reduced = 0  # blocks of this sample
        self._in_sample = False
        self._first_round = 0
        self._rounds = 0  # samples of this rank
        self._probes: list[Tensor] = []  # first rows of each weight, summed over own samples
        self._under_way: list[tuple[dist.Work, Callable[[], None]]] = []

    def _order_blocks(self, blocks: list[list[int]]) -> None:
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
        self.seconds = 0.0
        self.square_norms = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        self.squares = self._zero_rows() if self.needs.squares else []
        self.signed_sums = self._zero_rows() if self.needs.signed_sums else []
        self.grams = {}
        self._probes = [
            torch.zeros_like(
                probe_of(tapped, torch.empty(tapped.part_shape, device="meta")), device=self.device
            )
            for tapped in self.weights
        ]
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
        known = {w.name: (w.weight, w.seen) for w in self.weights}
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
        """Count host time as the measurement's, and name it for the profiler."""
        started = time.perf_counter()
        with record_function("measurement"):
            yield
        self.seconds += time.perf_counter() - started

    def _zero_rows(self) -> list[Tensor]:
        """Zeros for this rank's rows of every weight, flat, padded to the widest rank's."""
        return [torch.zeros(tapped.padded_rows, device=self.device) for tapped in self.weights]

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
        with self.measuring():  # within "backward", where autograd calls the hook
            position = self._position[index]
            if position < self._reduced:
                raise InputError(
                    f"{self.weights[index].name} got a second gradient in one sample; a sample "
                    "takes one backward pass: add losses up before it. A weight that several "
                    "segments of a reentrant activation checkpoint share needs use_reentrant=False"
                )
            arrived = self.waiting.setdefault(position, {})
            arrived[index] = arrived[index] + gradient if index in arrived else gradient
            if len(arrived) == len(self.blocks[position]):
                self._completed.append(position)
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
            places = torch.full((len(self.blocks),), len(self.blocks), device=self.device)
            for place, position in enumerate(self._completed):
                places[position] = place
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
        samples = {i: self.weights[i].part_of(gradients[i]).float() for i in members}
        torch._foreach_add_(
            [self._probes[i] for i in members],
            [probe_of(self.weights[i], sample) for i, sample in samples.items()],
        )
        squared = norms(list(samples.values())).double().square()
        # One place at a time: a list as an index would be copied to the device, and waited for.
        torch._foreach_add_([self.square_norms[i] for i in members], list(squared.unbind()))
        if self.needs.squares:
            self._scatter(members, [samples[i].square() for i in members], self.squares)
        if self.needs.signed_sums:
            sign = 1.0 if self._index_of_sample % 2 == 0 else -1.0
            self._scatter(members, [samples[i] * sign for i in members], self.signed_sums)
        for i in members:
            self._send_gram(i, gradients[i], samples[i])

    @property
    def _index_of_sample(self) -> int:
        """Of the current sample, in the batch: sample j belongs to rank j % num_data_ranks."""
        done = self._first_round + self._rounds
        return done * self.layout.num_data_ranks + self.layout.data_rank

    def _scatter(self, members: list[int], tensors: list[Tensor], sums: list[Tensor]) -> None:
        """Reduce-scatter whole tensors and add this rank's rows to its sums."""
        moved = [self.weights[i].rows_first(part) for i, part in zip(members, tensors, strict=True)]
        if self.layout.shard_group is None:
            torch._foreach_add_([sums[i] for i in members], [t.reshape(-1) for t in moved])
            return
        buffer = packed(moved, self.layout.num_shards)
        own = torch.empty_like(buffer[0])
        # torch 2.13 deprecates the older name, which is the only one that 2.11 has.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = scatter(own, buffer.flatten(), group=self.layout.shard_group, async_op=True)

        def add() -> None:
            widths = [sums[i].numel() for i in members]
            for i, part in zip(members, own.split(widths), strict=True):
                sums[i] += part

        self._after(work, add)

    def _send_gram(self, index: int, gradient: Tensor, sample: Tensor) -> None:
        """Reduce a sample's Gram to the matrix's owner, if it has one."""
        tapped = self.weights[index]
        if tapped.owner is None:
            return
        if tapped.in_parts and isinstance(gradient, DTensor):
            sample = gradient.full_tensor().float()
        data_rank, part = tapped.owner
        if part != self.layout.part:
            return
        # float64: where a sample has fewer tokens than the matrix is wide, float32 rounding fills
        # the null space, and a square root makes 1e-3 of 1e-7.
        gram = smaller_side_gram(sample.reshape(matrix_shape(sample)).double())
        group = self.layout.data_group
        work = (
            None
            if group is None
            else dist.reduce(gram, group=group, group_dst=data_rank, async_op=True)
        )

        def add() -> None:
            if data_rank == self.layout.data_rank:
                self.grams[index] = self.grams[index] + gram if index in self.grams else gram

        self._after(work, add)

    def _after(self, work: dist.Work | None, action: Callable[[], None]) -> None:
        """Run an action once a collective is done; at once where none was needed."""
        if work is None:
            action()
        else:
            self._under_way.append((work, action))

    def _finish(self) -> None:
        for work, action in self._under_way:
            work.wait()
            action()
        self._under_way.clear()

    def release(self) -> None:
        """Free the sums once they have been read."""
        self.squares, self.signed_sums, self.grams, self._probes = [], [], {}, []

    def sums(self, *, loss_scale: float = 1.0) -> SampleSums:
        """Return what the samples left on this rank; all ranks together, before clipping.

        Args:
            loss_scale: by which the loss was multiplied (torch.amp.GradScaler); gradients are
                divided by it.
        """
        self.agreement = self._agreement()
        if self.layout.replica_group is not None:
            for rows in (*self.squares, *self.signed_sums):
                dist.all_reduce(rows, group=self.layout.replica_group)
        # A sample's loss was divided by the rank's number of samples, so that gradients add up to
        # a mean.
        scale = self._rounds / loss_scale
        torch._foreach_mul_([*self.squares, *self.grams.values(), self.square_norms], scale**2)
        if self.signed_sums:
            torch._foreach_mul_(self.signed_sums, scale)
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
        matrices, signed_matrices = {}, {}
        if self.needs.matrices:
            matrices = owned_means(self.weights, loss_scale)
            if self.needs.signed_sums:
                signed = {
                    i: tapped.shard_from_rows(self.signed_sums[i])
                    for i, tapped in enumerate(self.weights)
                    if tapped.owner is not None
                }
                signed_matrices = owned_matrices(self.weights, signed)
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
            grams={i: self.grams.get(i, zero_gram(m)) for i, m in matrices.items()},
            matrices=matrices,
            signed_matrices=signed_matrices,
        )

    def _agreement(self) -> Tensor:
        """Return squared norms of the mean gradient, and of its difference to the samples' mean.

        They are equal but for rounding if every backward pass was a sample, nothing was in `.grad`
        before, and nothing has clipped or scaled it since.

        Returns:
            [weights, 2], float64; of this rank's rows among the first few of each weight, to be
            added over ranks.
        """
        flat = torch.cat([probe.reshape(-1) for probe in self._probes])
        if self.layout.data_group is not None:
            dist.all_reduce(flat, group=self.layout.data_group)
        flat /= self.layout.num_data_ranks
        probes = flat.split([probe.numel() for probe in self._probes])
        squares: list[Tensor] = []
        for tapped, probe, entries in zip(self.weights, self._probes, probes, strict=True):
            num_rows = tapped.part_shape[tapped.row_dim]
            own = self.layout.rows_of(self.layout.shard, num_rows)
            expected = entries.view_as(probe)[own]  # of the first rows, those that are this rank's
            mean = tapped.mean_rows(1.0)[: len(expected)]
            squares += [mean, expected - mean]
        norms = torch._foreach_norm(squares)
        return torch.stack(list(norms)).double().square().view(-1, 2)


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
