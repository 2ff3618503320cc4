"""Each sample's own gradient, tapped beside the gradient's own reduction.

A sample is a micro-batch on a rank. On a measured step a hook on every weight sees that sample's
gradient before accumulation and before any reduction, on one process, DDP, FSDP2 and HSDP alike; it
changes nothing, so a measured step trains with the same bits as an unmeasured one, and once removed
it costs nothing. What the estimators need of all samples is reduced at once, a block at a time:

    squares, signed gradients   reduce-scattered: every rank keeps its own rows, P / R floats each
    Grams of the smaller side   reduced to the one rank that owns the matrix

`tap_sums.py` reads them out after the last backward pass.
"""

import time
from collections.abc import Callable, Iterator
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
from gns_pretrain.noise_scale.sums import SampleSums
from gns_pretrain.parallel.collectives import reduce_scatter, reduce_to
from gns_pretrain.parallel.matrix_ownership import MatrixExchange, balanced_owners
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.shard_layout import ShardLayout, packed, rows_per_shard
from gns_pretrain.parallel.sharding import unwrapped

# Which weights the gradient tap listens to, where autograd reaches them, and who owns them.


@dataclass(frozen=True)
class TappedWeight:
    """A trainable weight and where its gradients are seen."""

    name: str
    kind: Kind
    weight: nn.Parameter  # what the optimizer updates; its .grad is the mean gradient
    seen: Tensor  # what autograd reaches: the weight itself, or FSDP2's unsharded copy
    owner: int | None  # rank that owns its Gram; None for what has none
    block: str  # weights of one block travel together

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight."""
        return self.weight.shape


def tapped_weights(model: nn.Module, world: World, *, all_2d: bool) -> list[TappedWeight]:
    """Every trainable weight, with what autograd reaches and, for matrices, an owner.

    Args:
        model: laid over ranks by `parallelize`.
        world: its ranks.
        all_2d: give embedding and output owners too, not the blocks' matrices alone.
    """
    llama = unwrapped(model)
    kinds = parameter_kinds(llama)
    seen = unsharded_weights(llama)
    trainable = [(n, p) for n, p in llama.named_parameters() if p.requires_grad]
    matrices = [name for name, _ in trainable if has_gram(kinds[name], all_2d=all_2d)]
    costs = [float(min(llama.get_parameter(name).shape)) ** 3 for name in matrices]
    owners = dict(zip(matrices, balanced_owners(costs, world.num_ranks), strict=True))
    return [
        TappedWeight(
            name=name,
            kind=kinds[name],
            weight=weight,
            seen=seen[name],
            owner=owners.get(name),
            block=block_of(name),
        )
        for name, weight in trainable
    ]


def has_gram(kind: Kind, *, all_2d: bool) -> bool:
    """Whether the nuclear geometry looks at weights of this kind."""
    if kind in (Kind.ATTENTION, Kind.FEED_FORWARD):
        return True
    return all_2d and kind in (Kind.EMBEDDING, Kind.OUTPUT)


def block_of(name: str) -> str:
    """Weights whose gradients come close together: `layers.3`, `embedding`, `norm` or `output`.

    FSDP2 keeps the last three in one group; here the output's gradient, the first of all, would
    wait for the embedding's, the last.
    """
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def unsharded_weights(llama: nn.Module) -> dict[str, Tensor]:
    """What autograd reaches for each weight: FSDP2 swaps it in for the forward and backward pass.

    These tensors stay the same objects when they are sharded and unsharded again (an
    implementation fact of torch 2.11 to 2.13, held by a test), so one look at the start serves
    every later step.
    """
    weights: dict[str, Tensor] = {
        name: weight for name, weight in llama.named_parameters() if not isinstance(weight, DTensor)
    }
    for module in llama.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            weights |= {
                name: weight
                for name, weight in llama.named_parameters()
                if not isinstance(weight, DTensor)
            }
            module.reshard()
    return weights


@dataclass(frozen=True)
class TapNeeds:
    """What has to be gathered for the geometries and estimates that were asked for."""

    squares: bool = False  # Manhattan noise
    signed_sums: bool = False  # cross-fitted signals
    grams: bool = False  # Nuclear noise
    all_2d: bool = False  # Grams of embedding and output too


class GradientTap:
    """Gathers what the samples of one step have in common and in what they differ.

    Args:
        model: laid over ranks by `parallelize`.
        world: its ranks.
        needs: what to gather.
    """

    def __init__(self, model: nn.Module, world: World, needs: TapNeeds) -> None:
        self.world = world
        self.layout = ShardLayout.of_mesh(world.mesh)
        self.needs = needs
        self.weights = tapped_weights(model, world, all_2d=needs.all_2d)
        self.num_samples = 0  # over all ranks
        self.num_even = 0  # of them, with an even index in the batch
        self.square_norms: Tensor  # [weights], float64; this rank's samples, summed
        self.squares: list[Tensor] = []  # own rows of each weight, flat, summed over all samples
        self.signed_sums: list[Tensor] = []  # likewise, with +1 and -1 by the sample's parity
        self.grams: dict[int, Tensor] = {}  # whole, of the weights this rank owns, all samples
        self._blocks = self._members_of_blocks()
        self.waiting: dict[str, dict[int, Tensor]] = {}  # gradients of blocks not yet complete
        self.seconds = 0.0  # host time spent on this step
        self._sample = 0
        self._accumulation = 1
        self._under_way: list[tuple[dist.Work, Callable[[], None]]] = []

    def _members_of_blocks(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = {}
        for index, tapped in enumerate(self.weights):
            members.setdefault(tapped.block, []).append(index)
        return members

    @contextmanager
    def armed(self, accumulation: int, *, first_round: int = 0) -> Iterator[None]:
        """Listen during the backward passes of one step.

        Args:
            first_round: micro-batches that each rank has taken before, of the same batch.
            accumulation: micro-batches of a rank; each one's loss is divided by it, which the tap
                undoes.
        """
        self.num_samples = accumulation * self.world.num_ranks
        self._accumulation = accumulation
        first = first_round * self.world.num_ranks
        self.num_even = len(range(first + first % 2, first + self.num_samples, 2))
        self._sample = first + self.world.rank
        self.seconds = 0.0
        self._clear()
        handles = [
            tapped.seen.register_hook(lambda gradient, i=index: self._see(i, gradient))
            for index, tapped in enumerate(self.weights)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _clear(self) -> None:
        device = self.world.device
        self.square_norms = torch.zeros(len(self.weights), dtype=torch.float64, device=device)
        self.squares = self._own_rows() if self.needs.squares else []
        self.signed_sums = self._own_rows() if self.needs.signed_sums else []
        self.grams = {}

    def _own_rows(self) -> list[Tensor]:
        """Zeros for this rank's rows of every weight, padded to the widest rank's."""
        return [
            torch.zeros(
                rows_per_shard(w.shape[0], self.layout.num_shards) * w.shape[1:].numel(),
                device=self.world.device,
            )
            for w in self.weights
        ]

    @torch.no_grad()
    def _see(self, index: int, gradient: Tensor) -> None:
        """The hook: keep a sample's gradient until its block is complete, then reduce the block."""
        started = time.perf_counter()
        with record_function("measurement"):  # within "backward", where autograd calls the hook
            block = self.weights[index].block
            arrived = self.waiting.setdefault(block, {})
            arrived[index] = gradient
            if len(arrived) == len(self._blocks[block]):
                self._reduce(self.waiting.pop(block))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def end_of_sample(self) -> None:
        """After each backward pass: reduce blocks in which some weight took no gradient."""
        started = time.perf_counter()
        for block in [name for name in self._blocks if name in self.waiting]:
            self._reduce(self.waiting.pop(block))
        self._finish()
        self._sample += self.world.num_ranks
        self.seconds += time.perf_counter() - started

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
        if self.needs.grams:
            for i in members:
                self._send_gram(i, samples[i])

    def _scatter(self, members: list[int], tensors: list[Tensor], sums: list[Tensor]) -> None:
        """Reduce-scatter whole tensors and add this rank's rows to its sums."""
        if self.layout.shard_group is None:
            torch._foreach_add_([sums[i] for i in members], [t.reshape(-1) for t in tensors])
            return
        buffer = packed(tensors, self.layout.num_shards)
        own, work = reduce_scatter(buffer, self.layout.shard_group)

        def add() -> None:
            widths = [sums[i].numel() for i in members]
            for i, part in zip(members, own.split(widths), strict=True):
                sums[i] += part

        self._after(work, add)

    def _send_gram(self, index: int, sample: Tensor) -> None:
        """Reduce a sample's Gram to the matrix's owner."""
        owner = self.weights[index].owner
        if owner is None:
            return
        # float64: where a sample has fewer tokens than the matrix is wide, float32 rounding fills
        # the null space, and a square root makes 1e-3 of 1e-7.
        gram = smaller_side_gram(sample.double())
        work = reduce_to(owner, gram, self.world)

        def add() -> None:
            if owner == self.world.rank:
                self.grams[index] = self.grams[index] + gram if index in self.grams else gram

        self._after(work, add)

    def _after(self, work: dist.Work | None, action: Callable[[], None]) -> None:
        """Do something once a collective is done; at once where none was needed."""
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
        """Let go of the sums once they have been read."""
        self.squares, self.signed_sums, self.grams = [], [], {}


# What the tap has gathered of a step's samples, brought to the ranks that look at it.
#
# Rows stay where they are; whole matrices come to their owners. The mean gradient is the
# optimizer's own, read after the last backward pass and before clipping.


def sample_sums(tap: GradientTap) -> SampleSums:
    """What the samples left on this rank, after the last one and before clipping; all together."""
    if tap.layout.replica_group is not None:
        for rows in (*tap.squares, *tap.signed_sums):
            dist.all_reduce(rows, group=tap.layout.replica_group)
    # Equal shard groups hold equal rows: the first one speaks for all.
    speaks = tap.layout.replica == 0
    matrices, signed_matrices = {}, {}
    if tap.needs.grams:
        matrices = owned_means(tap)
        if tap.needs.signed_sums:
            signed_matrices = owned_matrices(tap, lambda i: tap.signed_sums[i])
    return SampleSums(
        num_even=tap.num_even,
        num_odd=tap.num_samples - tap.num_even,
        square_norms=tap.square_norms,
        means=[mean_rows(tap, i) for i in range(len(tap.weights))] if speaks else [],
        squares=tap.squares if speaks else [],
        signed=tap.signed_sums if speaks else [],
        grams={i: tap.grams.get(i, no_gram(m)) for i, m in matrices.items()},
        matrices=matrices,
        signed_matrices=signed_matrices,
    )


def owned_means(tap: GradientTap) -> dict[int, Tensor]:
    """The mean gradients of the matrices that this rank owns, by weight."""
    if isinstance(tap.weights[0].weight, DTensor):
        return owned_matrices(tap, lambda i: mean_rows(tap, i))
    # Weights that are not sharded have their whole gradient here already.
    mine = [i for i, tapped in enumerate(tap.weights) if tapped.owner == tap.world.rank]
    return {i: gradient_or_zeros(tap.weights[i].weight) for i in mine}


def owned_matrices(tap: GradientTap, rows: Callable[[int], Tensor]) -> dict[int, Tensor]:
    """The whole matrices that this rank owns, by weight, from every rank's rows.

    Args:
        tap: its weights and layout.
        rows: this rank's rows of a weight, flat, perhaps padded.
    """
    layout = tap.layout
    home = {  # replica and shard of each matrix's owner
        i: divmod(tapped.owner, layout.num_shards)
        for i, tapped in enumerate(tap.weights)
        if tapped.owner is not None
    }
    replica = [i for i, (place, _) in home.items() if place == layout.replica]
    if not replica:  # fewer matrices than replicas: none belongs to this one
        return {}
    shapes = [(tap.weights[i].shape[0], tap.weights[i].shape[1]) for i in replica]
    exchange = MatrixExchange(shapes, [home[i][1] for i in replica], layout)
    own = [layout.rows_of(layout.shard, m) for m, _ in shapes]
    shards = [
        rows(i)[: (held.stop - held.start) * n].view(-1, n)
        for i, held, (_, n) in zip(replica, own, shapes, strict=True)
    ]
    return {replica[k]: matrix for k, matrix in exchange.to_owners(shards).items()}


def mean_rows(tap: GradientTap, index: int) -> Tensor:
    """This rank's rows of a weight's mean gradient, flat; zeros if it took none."""
    return tap.layout.local_rows(gradient_or_zeros(tap.weights[index].weight)).reshape(-1)


def no_gram(matrix: Tensor) -> Tensor:
    """The Gram of a matrix that no sample reached."""
    side = min(matrix.shape)
    return matrix.new_zeros(side, side, dtype=torch.float64)


def gradient_or_zeros(weight: nn.Parameter) -> Tensor:
    """A weight's mean gradient, in its own layout; zeros if no sample reached it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
