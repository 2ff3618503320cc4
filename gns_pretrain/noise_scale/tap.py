"""Each sample's own gradient, tapped beside the gradient's own reduction.

A sample is a micro-batch on a rank. On a measured step a hook on every weight sees that sample's
gradient before accumulation and before any reduction, on one process, DDP, FSDP2 and HSDP alike; it
changes nothing, so a measured step trains with the same bits as an unmeasured one, and once removed
it costs nothing. What the estimators need of all samples is reduced at once, a block at a time:

    squares, signed gradients   reduce-scattered: every rank keeps its own rows, P / R floats each
    Grams of the smaller side   reduced to the one rank that owns the matrix

After the last backward pass `GradientTap.sums` adds the mean gradient, which is the optimizer's own
before clipping: rows stay where they are, whole matrices go to their owners.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from gns_pretrain.geometry.square_root import smaller_side_gram
from gns_pretrain.model.llama import Kind, parameter_kinds
from gns_pretrain.noise_scale.geometries import Needs, SampleSums
from gns_pretrain.parallel.matrix_ownership import MatrixExchange, balanced_owners
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import ShardLayout, packed, rows_per_shard, unwrapped


@dataclass(frozen=True)
class TappedWeight:
    """A trainable weight and where its gradients are seen."""

    kind: Kind
    weight: nn.Parameter  # what the optimizer updates; its .grad is the mean gradient
    seen: Tensor  # what autograd reaches: the weight itself, or FSDP2's unsharded copy
    owner: int | None  # rank that owns its Gram; None for what has none
    block: str  # weights of one block travel together


def tapped_weights(
    model: nn.Module, world: World, matrices: Collection[Kind]
) -> list[TappedWeight]:
    """Return every trainable weight of a parallelized model, with what autograd reaches.

    Weights of the kinds `matrices` have owners, balanced by the cost of a square root.
    """
    llama = unwrapped(model)
    kinds = parameter_kinds(llama)
    seen = unsharded_weights(llama)
    trainable = [(n, p) for n, p in llama.named_parameters() if p.requires_grad]
    owned = [name for name, _ in trainable if kinds[name] in matrices]
    costs = [float(min(llama.get_parameter(name).shape)) ** 3 for name in owned]
    owners = dict(zip(owned, balanced_owners(costs, world.num_ranks), strict=True))
    return [
        TappedWeight(kinds[name], weight, seen[name], owners.get(name), block_of(name))
        for name, weight in trainable
    ]


def block_of(name: str) -> str:
    """Name the weights whose gradients come close together: `layers.3`, `embedding`, `output`, ...

    FSDP2 keeps the last three in one group; here the output's gradient, the first of all, would
    wait for the embedding's, the last.
    """
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def unsharded_weights(llama: nn.Module) -> dict[str, Tensor]:
    """Return what autograd reaches for each weight: FSDP2 swaps it in for forward and backward.

    These tensors stay the same objects when they are sharded and unsharded again (an
    implementation fact of torch 2.11 to 2.13, asserted by a test), so one look at the start serves
    every later step.
    """

    def plain() -> dict[str, Tensor]:
        return {n: w for n, w in llama.named_parameters() if not isinstance(w, DTensor)}

    weights = plain()
    for module in llama.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            weights |= plain()
            module.reshard()
    return weights


class GradientTap:
    """Gathers what the samples of one step have in common and in what they differ."""

    def __init__(self, model: nn.Module, world: World, needs: Needs) -> None:
        self.world = world
        self.layout = ShardLayout.of_mesh(world.mesh)
        self.needs = needs
        self.weights = tapped_weights(model, world, needs.matrices)
        self.num_samples = 0  # over all ranks
        self.num_even = 0  # of them, with an even index in the batch
        self.square_norms: Tensor  # [weights], float64; this rank's samples, summed
        self.squares: list[Tensor] = []  # own rows of each weight, flat, summed over all samples
        self.signed_sums: list[Tensor] = []  # likewise, with +1 and -1 by the sample's parity
        self.grams: dict[int, Tensor] = {}  # whole, of the weights this rank owns, all samples
        self._blocks: dict[str, list[int]] = {}  # weights by block
        for index, tapped in enumerate(self.weights):
            self._blocks.setdefault(tapped.block, []).append(index)
        self.waiting: dict[str, dict[int, Tensor]] = {}  # gradients of blocks not yet complete
        self.seconds = 0.0  # host time spent on this step
        self._sample = 0
        self._accumulation = 1
        self._under_way: list[tuple[dist.Work, Callable[[], None]]] = []

    @contextmanager
    def armed(self, accumulation: int, *, first_round: int = 0) -> Iterator[None]:
        """Listen during the backward passes of one step.

        Args:
            accumulation: micro-batches of a rank; each one's loss is divided by it, which the tap
                undoes.
            first_round: micro-batches that each rank has taken before, of the same batch.
        """
        self.num_samples = accumulation * self.world.num_ranks
        self._accumulation = accumulation
        first = first_round * self.world.num_ranks
        self.num_even = len(range(first + first % 2, first + self.num_samples, 2))
        self._sample = first + self.world.rank
        self.seconds = 0.0
        device = self.world.device
        self.square_norms = torch.zeros(len(self.weights), dtype=torch.float64, device=device)
        self.squares = self._zero_rows() if self.needs.squares else []
        self.signed_sums = self._zero_rows() if self.needs.signed_sums else []
        self.grams = {}
        handles = [
            tapped.seen.register_hook(lambda gradient, i=index: self._see(i, gradient))
            for index, tapped in enumerate(self.weights)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count host time as the measurement's, and name it for the profiler."""
        started = time.perf_counter()
        with record_function("measurement"):
            yield
        self.seconds += time.perf_counter() - started

    def _zero_rows(self) -> list[Tensor]:
        """Zeros for this rank's rows of every weight, flat, padded to the widest rank's."""
        return [
            torch.zeros(
                rows_per_shard(shape[0], self.layout.num_shards) * shape[1:].numel(),
                device=self.world.device,
            )
            for shape in (tapped.weight.shape for tapped in self.weights)
        ]

    @torch.no_grad()
    def _see(self, index: int, gradient: Tensor) -> None:
        """The hook: keep a sample's gradient until its block is complete, then reduce the block."""
        with self.measuring():  # within "backward", where autograd calls the hook
            block = self.weights[index].block
            arrived = self.waiting.setdefault(block, {})
            arrived[index] = gradient
            if len(arrived) == len(self._blocks[block]):
                self._reduce(self.waiting.pop(block))

    @torch.no_grad()
    def end_of_sample(self) -> None:
        """After each backward pass: reduce blocks in which some weight took no gradient."""
        with self.measuring():
            for block in [name for name in self._blocks if name in self.waiting]:
                self._reduce(self.waiting.pop(block))
            self._finish()
            self._sample += self.world.num_ranks

    def _reduce(self, gradients: dict[int, Tensor]) -> None:
        """Add one sample's gradients of one block to the sums, over all ranks."""
        # The previous block's traffic runs under this block's backward pass, no longer.
        self._finish()
        members = sorted(gradients)
        samples = {i: gradients[i].float() for i in members}
        if self._accumulation > 1:
            samples = {i: sample * self._accumulation for i, sample in samples.items()}
        norms = [torch.linalg.vector_norm(samples[i], dtype=torch.float64) for i in members]
        # One place at a time: a list as an index would be copied to the device, and waited for.
        torch._foreach_add_(
            [self.square_norms[i] for i in members], [norm.square() for norm in norms]
        )
        if self.needs.squares:
            self._scatter(members, [samples[i].square() for i in members], self.squares)
        if self.needs.signed_sums:
            sign = 1.0 if self._sample % 2 == 0 else -1.0
            self._scatter(members, [samples[i] * sign for i in members], self.signed_sums)
        for i in members:
            self._send_gram(i, samples[i])

    def _scatter(self, members: list[int], tensors: list[Tensor], sums: list[Tensor]) -> None:
        """Reduce-scatter whole tensors and add this rank's rows to its sums."""
        if self.layout.shard_group is None:
            torch._foreach_add_([sums[i] for i in members], [t.reshape(-1) for t in tensors])
            return
        buffer = packed(tensors, self.layout.num_shards)
        own = torch.empty_like(buffer[0])
        # torch 2.13 deprecates the older name, which is the only one that 2.11 has.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = scatter(own, buffer.flatten(), group=self.layout.shard_group, async_op=True)

        def add() -> None:
            widths = [sums[i].numel() for i in members]
            for i, part in zip(members, own.split(widths), strict=True):
                sums[i] += part

        self._after(work, add)

    def _send_gram(self, index: int, sample: Tensor) -> None:
        """Reduce a sample's Gram to the matrix's owner, if it has one."""
        owner = self.weights[index].owner
        if owner is None:
            return
        # float64: where a sample has fewer tokens than the matrix is wide, float32 rounding fills
        # the null space, and a square root makes 1e-3 of 1e-7.
        gram = smaller_side_gram(sample.double())
        work = dist.reduce(gram, owner, async_op=True) if self.world.num_ranks > 1 else None

        def add() -> None:
            if owner == self.world.rank:
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
        self.squares, self.signed_sums, self.grams = [], [], {}

    def sums(self) -> SampleSums:
        """Return what the samples left on this rank; all ranks together, before clipping."""
        if self.layout.replica_group is not None:
            for rows in (*self.squares, *self.signed_sums):
                dist.all_reduce(rows, group=self.layout.replica_group)
        # Equal shard groups hold equal rows, of which only the first group's are counted.
        counts = self.layout.replica == 0
        means = [self._mean_rows(i) for i in range(len(self.weights))] if counts else []
        matrices, signed_matrices = {}, {}
        if self.needs.matrices:
            matrices = self._owned_means()
            if self.needs.signed_sums:
                signed_matrices = self._owned_matrices(lambda i: self.signed_sums[i])
        return SampleSums(
            num_even=self.num_even,
            num_odd=self.num_samples - self.num_even,
            square_norms=self.square_norms,
            means=means,
            squares=without_padding(self.squares, means),
            signed=without_padding(self.signed_sums, means),
            grams={i: self.grams.get(i, zero_gram(m)) for i, m in matrices.items()},
            matrices=matrices,
            signed_matrices=signed_matrices,
        )

    def _mean_rows(self, index: int) -> Tensor:
        """This rank's rows of a weight's mean gradient; zeros if it took none."""
        return self.layout.local_rows(gradient_or_zeros(self.weights[index].weight))

    def _owned_means(self) -> dict[int, Tensor]:
        """The mean gradients of the matrices that this rank owns, by weight."""
        if isinstance(self.weights[0].weight, DTensor):
            return self._owned_matrices(self._mean_rows)
        # Weights that are not sharded have their whole gradient here already.
        owned = [i for i, tapped in enumerate(self.weights) if tapped.owner == self.world.rank]
        return {i: gradient_or_zeros(self.weights[i].weight) for i in owned}

    def _owned_matrices(self, rows: Callable[[int], Tensor]) -> dict[int, Tensor]:
        """The whole matrices that this rank owns, by weight, from every rank's (padded) rows."""
        layout = self.layout
        home = {  # replica and shard of each matrix's owner
            i: divmod(tapped.owner, layout.num_shards)
            for i, tapped in enumerate(self.weights)
            if tapped.owner is not None
        }
        replica = [i for i, (place, _) in home.items() if place == layout.replica]
        if not replica:  # fewer matrices than replicas: none belongs to this one
            return {}
        shapes = [(w.shape[0], w.shape[1]) for w in (self.weights[i].weight for i in replica)]
        exchange = MatrixExchange(shapes, [home[i][1] for i in replica], layout)
        local = [layout.rows_of(layout.shard, m) for m, _ in shapes]
        shards = [
            rows(i).reshape(-1)[: (own.stop - own.start) * n].view(-1, n)
            for i, own, (_, n) in zip(replica, local, shapes, strict=True)
        ]
        return {replica[k]: matrix for k, matrix in exchange.to_owners(shards).items()}


def gradient_or_zeros(weight: nn.Parameter) -> Tensor:
    """A weight's mean gradient, in its own layout; zeros if no sample reached it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def without_padding(flat: list[Tensor], means: list[Tensor]) -> list[Tensor]:
    """Sums of the weights' rows, in the rows' shapes; none where there are no rows or no sums."""
    return [part[: mean.numel()].view_as(mean) for part, mean in zip(flat, means, strict=False)]


def zero_gram(matrix: Tensor) -> Tensor:
    """The Gram of a matrix that no sample reached."""
    side = min(matrix.shape)
    return matrix.new_zeros(side, side, dtype=torch.float64)
