"""What each phase of a step and of a measurement costs one rank, counted from the code.

Legend: P parameters (P_b in block matrices, P_o the others); S ranks that share one copy of the
weights, R such groups, N = S R ranks; a micro-batches of a rank; V vocabulary, D model width; a
block matrix has a short side s and a long side l. Bytes sent are those that leave one rank.

Counted are products of matrices and what passes through memory beside them; the element-wise
operations inside the blocks are not (compiled, they are a few passes over the activations).
"""

from collections.abc import Sequence

from gns_pretrain.benchmark.cluster import (
    Layout,
    Load,
    Machine,
    Phase,
    all_to_all_rate,
    others,
    replica_rate,
    ring_rate,
)
from gns_pretrain.distributed.matrix_exchange import balanced_owners
from gns_pretrain.model.benchmark import flops_per_token
from gns_pretrain.model.config import LlamaConfig, count_parameters

# Passes over one float32 or bfloat16 logit in `model/loss.py`, in bytes read and written: product
# out 2, to float32 6, maximum 4, minus it 8, exp 8, sum 4, divided 8, to bfloat16 6, read by two
# products 4.
LOGIT_BYTES = 50
LOSS_SLICE_TOKENS = 2048
# A slice's [V, D] gradient: written and read in bfloat16, added to a float32 sum.
LOSS_GRADIENT_BYTES = 12
CLIP_BYTES = 12  # norm reads 4, scaling reads and writes 8
ADAMW_BYTES = 28  # reads w, g, m, v and writes w, m, v
# Muon's rows: momentum 8 + 12, Nesterov's sum 12, joined 8, decay 8, sign to float32 6, update 12;
# a whole matrix at its owner: joined 8, stacked 8, norm 4, divided 8, to bfloat16 6 and back 16.
MUON_BYTES = 66 + 50
# `gradient_tap.py`, a coordinate of a sample: to float32 6, its norm 4; times the accumulation 8.
TAP_BYTES, TAP_SCALING_BYTES = 10, 8
SQUARES_BYTES = 16  # squared 8, joined 8; rows that the ranks do not divide are padded too
DOUBLE_BYTES = 12  # float32 to float64
SUM_BYTES = 12  # what arrives, added to the sums
READ_BYTES = 80  # `sums.py`: ten element-wise passes over mean, squares and variance
ROOT_PRODUCTS = 36  # of `square_root.py`, float64, for each of two roots a matrix
NEWTON_SCHULZ_STEPS = 5


def block_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(s, l) of every matrix in the blocks, block by block."""
    kv_dim = config.num_kv_heads * config.head_dim
    sides = [(config.dim, config.dim)] * 2 + [(config.dim, kv_dim)] * 2
    sides += [(config.dim, config.ffn_dim)] * 3
    return [(min(pair), max(pair)) for pair in sides] * config.num_layers


def step_phases(load: Load, layout: Layout, machine: Machine) -> list[Phase]:
    """Phases of a step with AdamW; what runs beside what is left to the reader of their times."""
    config, shards, replicas = load.model, layout.num_shards, layout.num_replicas
    counts = count_parameters(config)
    root = counts.total - counts.in_blocks
    logits = load.tokens * config.known_vocab_size
    output_flops = 6.0 * logits * config.dim
    block_flops = load.tokens * flops_per_token(config, load.sequence_length) - output_flops
    slices = load.tokens / LOSS_SLICE_TOKENS
    output_bytes = float(logits * LOGIT_BYTES)
    output_bytes += slices * LOSS_GRADIENT_BYTES * config.known_vocab_size * config.dim
    ring = ring_rate(machine, shards)
    bfloat16, memory = machine.bfloat16_flops, machine.memory_bytes
    # Blocks are gathered for the forward pass and again for the backward pass, the root once.
    gathered = 2.0 * (2 * counts.in_blocks + root) * load.accumulation * others(shards)
    phases = [
        Phase("all-gather", sent=gathered, link_rate=ring),
        Phase("blocks, forward", block_flops / 3, bfloat16),
        Phase("blocks, backward", block_flops * 2 / 3, bfloat16),
        Phase("output matrix", output_flops, bfloat16),
        Phase("softmax and loss", memory=output_bytes, memory_rate=memory),
        Phase("reduce-scatter", sent=4.0 * counts.total * others(shards), link_rate=ring),
    ]
    if replicas > 1:
        sent = 2 * others(replicas) * 4.0 * counts.total / shards
        rate = replica_rate(machine, layout)
        phases.append(Phase("all-reduce over replicas", sent=sent, link_rate=rate))
    local = counts.total / shards
    return [
        *phases,
        Phase("clipping", memory=CLIP_BYTES * local, memory_rate=memory),
        Phase("AdamW", memory=ADAMW_BYTES * local, memory_rate=memory),
    ]


def muon_phases(load: Load, layout: Layout, machine: Machine) -> list[Phase]:
    """Muon in AdamW's place: every shard group orthogonalises all block matrices."""
    config, shards = load.model, layout.num_shards
    counts = count_parameters(config)
    shapes = block_shapes(config)
    in_matrices = sum(short * long for short, long in shapes)
    balanced_by = [float(short * short * long) for short, long in shapes]
    loads = owner_totals(balanced_by, newton_schulz(shapes), shards)
    local = in_matrices / shards
    rest = (counts.total - in_matrices) / shards
    rate = all_to_all_rate(machine, shards)
    return [
        Phase("Muon: rows to owners, float32", sent=4 * local * others(shards), link_rate=rate),
        Phase("Muon: Newton-Schulz", max(loads), machine.bfloat16_flops),
        Phase("Muon: results back, bfloat16", sent=2 * local * others(shards), link_rate=rate),
        Phase(
            "Muon: momentum and update; AdamW of the rest",
            memory=MUON_BYTES * local + ADAMW_BYTES * rest,
            memory_rate=machine.memory_bytes,
        ),
    ]


def newton_schulz(shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Operations of five steps on each matrix: X X^T, its square, and their product with X."""
    return [
        NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)
        for short, long in shapes
    ]


def tap_bytes(load: Load) -> int:
    """Bytes that the tap moves for a coordinate of a sample, before any statistic."""
    return TAP_BYTES + (TAP_SCALING_BYTES if load.accumulation > 1 else 0)


def manhattan_phases(load: Load, layout: Layout, machine: Machine) -> list[Phase]:
    """What a measured step adds: squares of every sample, reduced block by block."""
    shards, replicas = layout.num_shards, layout.num_replicas
    total = count_parameters(load.model).total
    local = total / shards
    per_sample = (tap_bytes(load) + SQUARES_BYTES) * total + SUM_BYTES * local
    memory = machine.memory_bytes
    phases = [
        Phase("Manhattan: squares", memory=load.accumulation * per_sample, memory_rate=memory),
        Phase(
            "Manhattan: reduce-scatter",
            sent=load.accumulation * 4.0 * total * others(shards),
            link_rate=ring_rate(machine, shards),
        ),
    ]
    if replicas > 1:
        sent = 2 * others(replicas) * 4.0 * local
        rate = replica_rate(machine, layout)
        phases.append(Phase("Manhattan: all-reduce", sent=sent, link_rate=rate))
    return [*phases, Phase("Manhattan: sums", memory=READ_BYTES * local, memory_rate=memory)]


def nuclear_phases(load: Load, layout: Layout, machine: Machine) -> list[Phase]:
    """What a measured step adds: Grams of every sample to their owners, and two roots each."""
    shards, ranks = layout.num_shards, layout.num_ranks
    total = count_parameters(load.model).total
    shapes = block_shapes(load.model)
    in_matrices = sum(short * long for short, long in shapes)
    grams = [2.0 * short * short * long for short, long in shapes]
    sides = [8.0 * short * short for short, _ in shapes]
    cubes = [float(short) ** 3 for short, _ in shapes]
    roots = [2.0 * ROOT_PRODUCTS * 2.0 * cube for cube in cubes]
    float64, memory = machine.float64_flops, machine.memory_bytes
    samples = load.accumulation
    per_sample = tap_bytes(load) * total + DOUBLE_BYTES * in_matrices
    # A reduce to one rank sends the whole from every other one.
    moved = samples * sum(sides) * others(ranks)
    return [
        Phase("Nuclear: to float64", memory=samples * per_sample, memory_rate=memory),
        Phase("Nuclear: Grams", samples * sum(grams), float64),
        Phase("Nuclear: Grams to owners", sent=moved, link_rate=ring_rate(machine, ranks)),
        Phase(
            "Nuclear: mean matrices to owners",
            sent=4.0 * in_matrices / ranks * others(shards),
            link_rate=all_to_all_rate(machine, shards),
        ),
        Phase("Nuclear: Grams of the mean", max(owner_totals(cubes, grams, ranks)), float64),
        Phase("Nuclear: square roots", max(owner_totals(cubes, roots, ranks)), float64),
    ]


def owner_totals(costs: Sequence[float], work: Sequence[float], ranks: int) -> list[float]:
    """Each rank's work, where the owners are balanced by `costs`."""
    totals = [0.0] * ranks
    for owner, amount in zip(balanced_owners(costs, ranks), work, strict=True):
        totals[owner] += amount
    return totals


def seconds_of(phases: Sequence[Phase]) -> float:
    """One after the other."""
    return sum(phase.seconds for phase in phases)


def step_seconds(phases: Sequence[Phase]) -> float:
    """A step whose traffic runs beside its products, and whose optimizer follows them."""
    talking = [phase for phase in phases if phase.sent]
    after = [phase for phase in phases if phase.name in ("clipping", "AdamW")]
    computing = [phase for phase in phases if phase not in talking and phase not in after]
    return max(seconds_of(talking), seconds_of(computing)) + seconds_of(after)
