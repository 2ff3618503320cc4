"""A roofline estimate of a step and of a measurement: each phase's work on one rank, counted.

Legend: P parameters (P_b in block matrices, P_o the others); S ranks that share one copy of the
weights, R such groups, N = S R ranks; a micro-batches of a rank; V vocabulary size, D model width;
a block matrix has a short side s and a long side l. Bytes sent are those that leave one rank.

Counted are matmuls and the memory traffic beside them; the element-wise operations inside the
blocks are not (compiled, they read and write the activations a few times).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from benchmarks.harness import MODELS, Command, Row, model_config
from benchmarks.model import flops_per_token
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, at_least, one_of
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.parallel.matrix_ownership import balanced_owners

# Rates that a rank is assumed to reach on an H100 SXM: the data sheet's times a share.
RANKS_PER_NODE = 8
BFLOAT16_FLOPS = 989e12 * 0.7
FLOAT64_FLOPS = 67e12 * 0.8
MEMORY_BYTES = 3.35e12 * 0.9
NVLINK_BYTES = 450e9 * 0.8  # a second, one direction
NETWORK_BYTES = 50e9 * 0.8  # a second, one 400 Gb/s card a rank
ASSUMED = (
    ("bfloat16 matmuls", BFLOAT16_FLOPS / 1e12, "TFLOP/s", "989 x 0.7"),
    ("float64 matmuls", FLOAT64_FLOPS / 1e12, "TFLOP/s", "67 x 0.8"),
    ("memory", MEMORY_BYTES / 1e12, "TB/s", "3.35 x 0.9"),
    ("NVLink, one direction", NVLINK_BYTES / 1e9, "GB/s a GPU", "450 x 0.8"),
    ("network", NETWORK_BYTES / 1e9, "GB/s a GPU", "400 Gb/s card, x 0.8"),
)

# Bytes read and written for a bfloat16 logit in `model/loss.py`, compiled: matmul's output 2,
# maximum and sum 2, softmax 4, read by two matmuls 4.
LOGIT_BYTES = 12
LOSS_SLICE_TOKENS = 2048
# A slice's [V, D] gradient: added to a float32 sum.
LOSS_GRADIENT_BYTES = 8
CLIP_BYTES = 12  # norm reads 4, scaling reads and writes 8
ADAMW_BYTES = 28  # reads w, g, m, v and writes w, m, v
# Muon's rows: momentum 8 + 12, Nesterov's sum 12, joined 8, decay 8, sign to float32 6, update 12;
# a whole matrix at its owner: joined 8, stacked 8, norm 4, divided 8, to bfloat16 6 and back 16.
MUON_BYTES = 66 + 50
# The tap, a coordinate of a sample: to float32 6, its norm 4; times the accumulation 8.
TAP_BYTES, TAP_SCALING_BYTES = 10, 8
SQUARES_BYTES = 16  # squared 8, joined 8; rows that the ranks do not divide are padded too
DOUBLE_BYTES = 12  # float32 to float64
SUM_BYTES = 12  # what arrives, added to the sums
READ_BYTES = 80  # `sums.py`: ten element-wise operations on mean, squares and variance
ROOT_MATMULS = 36  # of `square_root.py`, float64, for each of two roots a matrix
NEWTON_SCHULZ_STEPS = 5

# A GPU's sequences in the tables: the paper's cost figures for the 160M model.
SEQUENCES = {"llama3_160m": 16}
OTHER_SEQUENCES = 8
SEQUENCE_LENGTH = 2048
VOCAB_SIZE = 128_256

MATMULS, MEMORY, INTERCONNECT = "matmuls", "memory", "interconnect"
UNITS = {MATMULS: (1e12, "TFLOP"), MEMORY: (1e9, "GB in memory"), INTERCONNECT: (1e9, "GB sent")}


@dataclass
class Roofline(Command):
    """A roofline estimate of each phase on H100s, as Markdown; measures nothing."""

    model: Annotated[list[str], one_of(*MODELS), About("files in conf/model")] = field(
        default_factory=lambda: ["llama3_160m", "llama3_1b"]
    )
    ranks: Annotated[list[int], at_least(1), About("GPUs (default: 8 and 64)")] = field(
        default_factory=lambda: [8, 64]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.ranks:
            if count > RANKS_PER_NODE and count % RANKS_PER_NODE:
                raise InputError(
                    f"--ranks={count} are not whole nodes of {RANKS_PER_NODE} GPUs; "
                    f"use a multiple of {RANKS_PER_NODE}"
                )

    def run(self) -> Iterator[Row]:
        """Yield one row: the assumed rates, then a table for each model and number of ranks."""
        parts = [
            "Assumed of an H100 SXM:",
            "\n".join(f"- {name}: {rate:.3g} {unit} ({how})" for name, rate, unit, how in ASSUMED),
        ]
        for name in self.model:
            model = model_config(name, VOCAB_SIZE)
            parts += [table(model, SEQUENCES.get(name, OTHER_SEQUENCES), n) for n in self.ranks]
        yield {"measured": "nothing", "markdown": "\n\n".join(parts) + "\n"}


class Phase(NamedTuple):
    """One rank's work in one phase, in a whole step."""

    name: str
    bound: str  # MATMULS (FLOPs), MEMORY (bytes read and written) or INTERCONNECT (bytes sent)
    work: float
    rate: float  # of work, a second

    @property
    def seconds(self) -> float:
        return self.work / self.rate


@dataclass
class StepCost:
    """The phases of a step and of what may be added to it or stand in AdamW's place."""

    model: LlamaConfig  # with a vocabulary
    num_ranks: int  # N; FSDP2 if all share the weights, HSDP if groups of them do
    num_shards: int  # S
    sequences: int  # of a micro-batch
    accumulation: int = 1  # a
    sequence_length: int = SEQUENCE_LENGTH  # tokens

    def __post_init__(self) -> None:
        self.tokens = self.sequences * self.accumulation * self.sequence_length  # of a rank's step
        self.counts = count_parameters(self.model)
        kv_dim = self.model.num_kv_heads * self.model.head_dim
        sides = [self.model.dim] * 2 + [kv_dim] * 2 + [self.model.ffn_dim] * 3
        # (s, l) of the block matrices, block by block: attention's four, feed-forward's three.
        self.shapes = [tuple(sorted((self.model.dim, side))) for side in sides]
        self.shapes *= self.model.num_layers
        self.in_matrices = sum(short * long for short, long in self.shapes)
        self.local = self.counts.total / self.num_shards  # parameters of a rank's shard
        self.from_others = (self.num_shards - 1) / self.num_shards  # not a rank's own
        self.ring = ring_rate(self.num_shards)
        # An all-to-all has something for each rank of another node, over its own card.
        leaving = max(self.num_shards - RANKS_PER_NODE, 0) / max(self.num_shards - 1, 1)
        self.all_to_all = NETWORK_BYTES / leaving if leaving else NVLINK_BYTES
        # What the tap moves for a coordinate of a sample, before any statistic.
        self.tap_bytes = TAP_BYTES + (TAP_SCALING_BYTES if self.accumulation > 1 else 0)

    def step(self) -> list[Phase]:
        """Return the phases of a step with AdamW, as if each ran alone."""
        counts = self.counts
        root = counts.total - counts.in_blocks
        logits = self.tokens * self.model.known_vocab_size
        output_flops = 6.0 * logits * self.model.dim
        step_flops = self.tokens * flops_per_token(self.model, self.sequence_length)
        block_flops = step_flops - output_flops
        slices = self.tokens / LOSS_SLICE_TOKENS
        slice_bytes = LOSS_GRADIENT_BYTES * self.model.known_vocab_size * self.model.dim
        loss_bytes = logits * LOGIT_BYTES + slices * slice_bytes
        # Blocks are gathered for the forward pass and again for the backward pass, the root once.
        gathered = 2.0 * (2 * counts.in_blocks + root) * self.accumulation * self.from_others
        reduced = 4.0 * counts.total * self.from_others
        return [
            Phase("all-gather", INTERCONNECT, gathered, self.ring),
            Phase("blocks, forward", MATMULS, block_flops / 3, BFLOAT16_FLOPS),
            Phase("blocks, backward", MATMULS, block_flops * 2 / 3, BFLOAT16_FLOPS),
            Phase("output matrix", MATMULS, output_flops, BFLOAT16_FLOPS),
            Phase("softmax and loss", MEMORY, loss_bytes, MEMORY_BYTES),
            Phase("reduce-scatter", INTERCONNECT, reduced, self.ring),
            *self._all_reduce("all-reduce over replicas"),
            Phase("clipping", MEMORY, CLIP_BYTES * self.local, MEMORY_BYTES),
            Phase("AdamW", MEMORY, ADAMW_BYTES * self.local, MEMORY_BYTES),
        ]

    def muon(self) -> list[Phase]:
        """Return Muon's phases: every shard group orthogonalises all block matrices.

        Five Newton-Schulz steps on each: X X^T, its square, and their product with X.
        """
        work = [
            NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)
            for short, long in self.shapes
        ]
        costs = [float(short * short * long) for short, long in self.shapes]
        most = busiest_owner(costs, work, self.num_shards)
        local = self.in_matrices / self.num_shards
        sent = local * self.from_others
        traffic = MUON_BYTES * local + ADAMW_BYTES * (self.local - local)
        return [
            Phase("Muon: rows to owners, float32", INTERCONNECT, 4 * sent, self.all_to_all),
            Phase("Muon: Newton-Schulz", MATMULS, most, BFLOAT16_FLOPS),
            Phase("Muon: results back, bfloat16", INTERCONNECT, 2 * sent, self.all_to_all),
            Phase("Muon: momentum and update; AdamW of the rest", MEMORY, traffic, MEMORY_BYTES),
        ]

    def manhattan(self) -> list[Phase]:
        """Return what a measured step adds: squares of every sample, reduced block by block."""
        total, samples = self.counts.total, self.accumulation
        per_sample = (self.tap_bytes + SQUARES_BYTES) * total + SUM_BYTES * self.local
        reduced = samples * 4.0 * total * self.from_others
        return [
            Phase("Manhattan: squares", MEMORY, samples * per_sample, MEMORY_BYTES),
            Phase("Manhattan: reduce-scatter", INTERCONNECT, reduced, self.ring),
            *self._all_reduce("Manhattan: all-reduce"),
            Phase("Manhattan: sums", MEMORY, READ_BYTES * self.local, MEMORY_BYTES),
        ]

    def nuclear(self) -> list[Phase]:
        """Return what a measured step adds: each sample's Grams to owners, two roots each."""
        ranks, samples = self.num_ranks, self.accumulation
        grams = [2.0 * short * short * long for short, long in self.shapes]
        cubes = [float(short) ** 3 for short, _ in self.shapes]
        roots = [2.0 * ROOT_MATMULS * 2.0 * cube for cube in cubes]
        per_sample = self.tap_bytes * self.counts.total + DOUBLE_BYTES * self.in_matrices
        # A reduce to one rank sends the whole from every other one.
        gram_bytes = sum(8.0 * short * short for short, _ in self.shapes)
        moved = samples * gram_bytes * (ranks - 1) / ranks
        means = 4.0 * self.in_matrices / ranks * self.from_others
        mean_grams = busiest_owner(cubes, grams, ranks)
        all_roots = busiest_owner(cubes, roots, ranks)
        return [
            Phase("Nuclear: to float64", MEMORY, samples * per_sample, MEMORY_BYTES),
            Phase("Nuclear: Grams", MATMULS, samples * sum(grams), FLOAT64_FLOPS),
            Phase("Nuclear: Grams to owners", INTERCONNECT, moved, ring_rate(ranks)),
            Phase("Nuclear: mean matrices to owners", INTERCONNECT, means, self.all_to_all),
            Phase("Nuclear: Grams of the mean", MATMULS, mean_grams, FLOAT64_FLOPS),
            Phase("Nuclear: square roots", MATMULS, all_roots, FLOAT64_FLOPS),
        ]

    def _all_reduce(self, name: str) -> list[Phase]:
        """A float32 shard over the replicas, where there are several."""
        replicas = self.num_ranks // self.num_shards
        if replicas == 1:
            return []
        sent = 2 * (replicas - 1) / replicas * 4.0 * self.local
        rate = NVLINK_BYTES if self.num_ranks <= RANKS_PER_NODE else NETWORK_BYTES
        return [Phase(name, INTERCONNECT, sent, rate)]

    def summary(self) -> list[tuple[str, str, str]]:
        """Return what follows from the phases: label, and the cells of work and milliseconds.

        Traffic runs beside the matmuls, and the optimizer follows both.
        """
        phases = {phase.name: phase for phase in self.step()}
        adamw = phases.pop("AdamW").seconds
        after = phases.pop("clipping").seconds + adamw
        sent = seconds_of([p for p in phases.values() if p.bound == INTERCONNECT])
        computed = seconds_of([p for p in phases.values() if p.bound != INTERCONNECT])
        step, update = max(sent, computed) + after, seconds_of(self.muon())
        rows = [
            ("step, AdamW", "", f"{1e3 * step:.1f}"),
            ("tokens/s a GPU, at most", f"{self.tokens / step:,.0f}", ""),
            ("Muon's share", f"{100 * update / (step - adamw + update):.1f} %", ""),
        ]
        for name, added in (("Manhattan", self.manhattan()), ("Nuclear", self.nuclear())):
            share = 100 * seconds_of(added) / step
            rows.append((f"{name}, F = 1, F = 100", f"{share:.1f} %, {share / 100:.2f} %", ""))
        return rows


def ring_rate(ranks: int) -> float:
    """Return bytes a second and rank of an all-gather, reduce-scatter or reduce over a ring.

    Rings enter and leave a node once, over all of its cards: each carries its share.
    """
    if ranks <= RANKS_PER_NODE:
        return NVLINK_BYTES
    return min(NVLINK_BYTES, RANKS_PER_NODE * NETWORK_BYTES)


def busiest_owner(costs: Sequence[float], work: Sequence[float], ranks: int) -> float:
    """Return the most work of a rank, where the owners are balanced by `costs`."""
    totals = [0.0] * ranks
    for owner, amount in zip(balanced_owners(costs, ranks), work, strict=True):
        totals[owner] += amount
    return max(totals)


def seconds_of(phases: Sequence[Phase]) -> float:
    return sum(phase.seconds for phase in phases)


def table(model: LlamaConfig, sequences: int, ranks: int) -> str:
    """Return one model on one number of ranks as Markdown, FSDP2 and HSDP side by side.

    HSDP's shard groups are nodes, or half a node where there is one.
    """
    shards = RANKS_PER_NODE if ranks > RANKS_PER_NODE else max(ranks // 2, 1)
    layouts = {"FSDP2": ranks, f"HSDP {ranks // shards} x {shards}": shards}
    costs = {name: StepCost(model, ranks, n, sequences=sequences) for name, n in layouts.items()}
    columns = [
        {p.name: p for p in (*c.step(), *c.muon(), *c.manhattan(), *c.nuclear())}
        for c in costs.values()
    ]
    head = ["a GPU's", *(cell for name in costs for cell in (f"{name}: work", "ms", "bound by"))]
    lines = [head, ["---"] * len(head)]
    for name in max(columns, key=len):
        cells = [cell for phases in columns for cell in phase_cells(phases.get(name))]
        lines.append([name, *cells])
    for rows in zip(*(c.summary() for c in costs.values()), strict=True):
        lines.append([f"**{rows[0][0]}**", *(cell for row in rows for cell in (*row[1:], ""))])
    title = (
        f"**{model.name}, {ranks} GPUs**, {sequences} sequences of {SEQUENCE_LENGTH:,} tokens a GPU"
    )
    return title + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def phase_cells(phase: Phase | None) -> list[str]:
    """Return work, milliseconds and bound of one phase."""
    if phase is None:
        return ["-", "-", "-"]
    unit, name = UNITS[phase.bound]
    return [f"{phase.work / unit:.3g} {name}", f"{1e3 * phase.seconds:.2f}", phase.bound]
