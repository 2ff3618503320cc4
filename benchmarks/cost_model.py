"""What each phase of a step and of a measurement costs one rank, counted from the code.

Legend: P parameters (P_b in block matrices, P_o the others); S ranks that share one copy of the
weights, R such groups, N = S R ranks; a micro-batches of a rank; V vocabulary, D model width; a
block matrix has a short side s and a long side l. Bytes sent are those that leave one rank.

Counted are products of matrices and what passes through memory beside them; the element-wise
operations inside the blocks are not (compiled, they are a few passes over the activations).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.model import flops_per_token
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.parallel.matrix_ownership import balanced_owners

# Ranks, links and rates on paper: how long a phase of so much work takes one rank.

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """Rates that a rank is assumed to reach: the data sheet's times a share."""

    name: str = "H100 SXM"
    ranks_per_node: int = RANKS_PER_NODE
    bfloat16_flops: float = 989e12 * 0.7
    float64_flops: float = 67e12 * 0.8
    memory_bytes: float = 3.35e12 * 0.9
    node_bytes: float = 450e9 * 0.8  # a second, NVLink, one direction
    network_bytes: float = 50e9 * 0.8  # a second, one 400 Gb/s card a rank


@dataclass(frozen=True)
class Layout:
    """Ranks and how they share the weights; FSDP2 if all do, HSDP if groups of them do."""

    num_ranks: int
    num_shards: int

    @property
    def num_replicas(self) -> int:
        """R, groups with the whole weights."""
        return self.num_ranks // self.num_shards


@dataclass(frozen=True)
class Load:
    """What a rank computes in a step."""

    model: LlamaConfig
    sequences: int  # of a micro-batch
    accumulation: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Of a rank in a step."""
        return self.sequences * self.accumulation * self.sequence_length


@dataclass(frozen=True)
class Phase:
    """One rank's work in one phase, in a whole step."""

    name: str
    flops: float = 0.0
    flops_rate: float = 1.0
    memory: float = 0.0  # bytes read and written
    memory_rate: float = 1.0
    sent: float = 0.0  # bytes
    link_rate: float = 1.0

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each resource needs."""
        return {
            "products": self.flops / self.flops_rate,
            "memory": self.memory / self.memory_rate,
            "links": self.sent / self.link_rate,
        }

    @property
    def seconds(self) -> float:
        """A phase is of one kind in the main; what needs longest counts."""
        return max(self.times.values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.times, key=lambda name: self.times[name])


def ring_rate(machine: Machine, ranks: int) -> float:
    """Bytes a second and rank of an all-gather, reduce-scatter or reduce over neighbouring ranks.

    Rings enter and leave a node once, over all of its cards: each carries its share.
    """
    if ranks <= machine.ranks_per_node:
        return machine.node_bytes
    return min(machine.node_bytes, machine.ranks_per_node * machine.network_bytes)


def all_to_all_rate(machine: Machine, ranks: int) -> float:
    """Bytes a second and rank when each rank has something for each: no card can be shared."""
    if ranks <= machine.ranks_per_node:
        return machine.node_bytes
    leaving = (ranks - machine.ranks_per_node) / (ranks - 1)
    return machine.network_bytes / leaving


def replica_rate(machine: Machine, layout: Layout) -> float:
    """Bytes a second and rank of an all-reduce over the ranks that hold the same shard."""
    inside = layout.num_ranks <= machine.ranks_per_node
    return machine.node_bytes if inside else machine.network_bytes


def others(ranks: int) -> float:
    """(S - 1) / S, the share that is not a rank's own."""
    return (ranks - 1) / ranks


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


# The on-paper tables of docs/performance.md: each phase's work, time and bound, by layout.

# Sequences of a rank's micro-batch, the paper's cost figures; others take the second.
SEQUENCES = {"llama3_160m": 16}
OTHER_SEQUENCES = 8
SEQUENCE_LENGTH = 2048


def paper_tables(models: Sequence[LlamaConfig], ranks: Sequence[int]) -> str:
    """Markdown: the assumed rates, then a table for each model and number of ranks.

    Args:
        models: with their vocabularies.
        ranks: numbers of GPUs; more than a node's come in whole nodes.
    """
    machine = Machine()
    parts = [assumptions(machine)]
    for model in models:
        sequences = SEQUENCES.get(model.name, OTHER_SEQUENCES)
        load = Load(model, sequences, accumulation=1, sequence_length=SEQUENCE_LENGTH)
        for count in ranks:
            parts.append(table(load, layouts(count, machine), machine))
    return "\n\n".join(parts) + "\n"


def layouts(ranks: int, machine: Machine) -> dict[str, Layout]:
    """FSDP2 over all ranks; HSDP with nodes as shard groups, half a node where there is one."""
    per_node = machine.ranks_per_node
    shards = per_node if ranks > per_node else max(ranks // 2, 1)
    return {
        "FSDP2": Layout(ranks, ranks),
        f"HSDP {ranks // shards} x {shards}": Layout(ranks, shards),
    }


def assumptions(machine: Machine) -> str:
    """The rates behind every time."""
    rows = [
        ("bfloat16 products", machine.bfloat16_flops / 1e12, "TFLOP/s", "989 x 0.7"),
        ("float64 products", machine.float64_flops / 1e12, "TFLOP/s", "67 x 0.8"),
        ("memory", machine.memory_bytes / 1e12, "TB/s", "3.35 x 0.9"),
        ("NVLink, one direction", machine.node_bytes / 1e9, "GB/s a GPU", "450 x 0.8"),
        ("network", machine.network_bytes / 1e9, "GB/s a GPU", "400 Gb/s card, x 0.8"),
    ]
    lines = [f"{name}: {rate:.3g} {unit} ({how})" for name, rate, unit, how in rows]
    return f"Assumed of an {machine.name}:\n\n" + "\n".join(f"- {line}" for line in lines)


def table(load: Load, of: dict[str, Layout], machine: Machine) -> str:
    """One model on one number of ranks, the layouts side by side."""
    columns = {name: all_phases(load, layout, machine) for name, layout in of.items()}
    longest_first = sorted(columns.values(), key=len, reverse=True)
    names = list(dict.fromkeys(phase.name for phases in longest_first for phase in phases))
    ranks = next(iter(of.values())).num_ranks
    title = (
        f"**{load.model.name}, {ranks} GPUs**, {load.sequences} sequences of "
        f"{load.sequence_length:,} tokens a GPU"
    )
    head = ["a GPU's"]
    for name in of:
        head += [f"{name}: work", "ms", "bound by"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        cells = [name]
        for phases in columns.values():
            cells += described(next((p for p in phases if p.name == name), None))
        lines.append(cells)
    lines += totals(load, of, machine)
    return title + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def all_phases(load: Load, layout: Layout, machine: Machine) -> list[Phase]:
    """Of a step, of Muon in AdamW's place, and of the two measurements."""
    kinds = (step_phases, muon_phases, manhattan_phases, nuclear_phases)
    return [phase for kind in kinds for phase in kind(load, layout, machine)]


def described(phase: Phase | None) -> list[str]:
    """Work, milliseconds and bound of one phase."""
    if phase is None:
        return ["-", "-", "-"]
    work = [
        f"{amount / unit:.3g} {name}"
        for amount, unit, name in (
            (phase.flops, 1e12, "TFLOP"),
            (phase.memory, 1e9, "GB in memory"),
            (phase.sent, 1e9, "GB sent"),
        )
        if amount
    ]
    return [", ".join(work), f"{1e3 * phase.seconds:.2f}", phase.bound]


def totals(load: Load, of: dict[str, Layout], machine: Machine) -> list[list[str]]:
    """The step, Muon's share of its own, and each measurement as a share of AdamW's."""
    step, rate, muon = ["**step, AdamW**"], ["**tokens/s a GPU, at most**"], ["**Muon's share**"]
    measured = {"Manhattan": manhattan_phases, "Nuclear": nuclear_phases}
    shares = {name: [f"**{name}, F = 1, F = 100**"] for name in measured}
    for layout in of.values():
        phases = step_phases(load, layout, machine)
        seconds = step_seconds(phases)
        adamw = seconds_of([phase for phase in phases if phase.name == "AdamW"])
        update = seconds_of(muon_phases(load, layout, machine))
        step += ["", f"{1e3 * seconds:.1f}", ""]
        rate += [f"{load.tokens / seconds:,.0f}", "", ""]
        muon += [f"{100 * update / (seconds - adamw + update):.1f} %", "", ""]
        for name, kind in measured.items():
            share = 100 * seconds_of(kind(load, layout, machine)) / seconds
            shares[name] += [f"{share:.1f} %, {share / 100:.2f} %", "", ""]
    return [step, rate, muon, *shares.values()]
