"""The on-paper tables of docs/performance.md: each phase's work, time and bound, by layout."""

from collections.abc import Sequence

from gns_pretrain.benchmark.cluster import Layout, Load, Machine, Phase
from gns_pretrain.benchmark.costs import (
    manhattan_phases,
    muon_phases,
    nuclear_phases,
    seconds_of,
    step_phases,
    step_seconds,
)
from gns_pretrain.model.config import LlamaConfig

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
