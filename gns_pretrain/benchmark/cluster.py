"""Ranks, links and rates on paper: how long a phase of so much work takes one rank."""

from dataclasses import dataclass

from gns_pretrain.model.config import LlamaConfig

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
