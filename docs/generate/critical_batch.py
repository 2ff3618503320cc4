"""Make the tables and pictures of docs/critical_batch.md from its runs.

python docs/generate/critical_batch.py outputs

Runs are recognized by the names that the page's commands give them.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt

from gns_pretrain.results.critical_batch import CriticalBatch, critical_batches
from gns_pretrain.results.figures import COLORS, STYLE
from gns_pretrain.results.frame import pd, runs_of_folders
from gns_pretrain.tracking.jsonl import read_records

DOCS = Path(__file__).parents[1]
OPTIMIZERS = {"signsgd": "signSGD", "signum": "Signum", "adamw": "AdamW", "muon": "Muon"}
POLICIES = {
    "adaptive0.6": "adaptive, plug-in, theta 0.6",
    "cross4": "adaptive, cross-fitted, theta 4",
    "progress0.1": "progress, price 0.1",
    "progress0.2": "progress, price 0.2",
    "progress0.2lin": "progress, price 0.2, linear scaling",
    "seesaw": "seesaw",
    "late": "late switch, 64 from 75 %",
}
NAME = re.compile(r"(?P<kind>[a-z]+[\d.]*(lin)?(-x[\d.]+)?)-(?P<optimizer>[a-z]+)-s(?P<seed>\d)")


@dataclass(frozen=True)
class Cell:
    """One kind of run of one optimizer, over seeds."""

    losses: list[float]  # last validation loss, nats per token
    steps: list[int]
    batches: list[int]  # of the last step

    def __str__(self) -> str:
        loss = f"{fmean(self.losses):.3f}"
        if len(self.losses) > 1:
            loss += f" ± {stdev(self.losses):.3f}"
        return f"{loss} | {fmean(self.steps):.0f} | {fmean(self.batches):.0f}"


def cells(folder: Path) -> dict[tuple[str, str], Cell]:
    """By kind and optimizer."""
    found: dict[tuple[str, str], Cell] = {}
    for summary in sorted(folder.glob("*/summary.json")):
        if not (match := NAME.fullmatch(summary.parent.name)):
            continue
        records = read_records(summary.parent / "metrics.jsonl")
        cell = found.setdefault((match["kind"], match["optimizer"]), Cell([], [], []))
        cell.losses.append([line["loss"] for line in records if line["kind"] == "validation"][-1])
        last = [line for line in records if line["kind"] == "train"][-1]
        cell.steps.append(last["step"])
        cell.batches.append(last["batch_size"])
    return found


def policies_table(found: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """Policies beside constant batches, an optimizer each."""
    rows = {f"const{size}-x1": f"constant {size}" for size in (16, 32, 64, 128)} | POLICIES
    for optimizer, label in OPTIMIZERS.items():
        yield f"\n| {label} | validation loss | steps | last batch |\n|---|---|---|---|"
        for kind, name in rows.items():
            if (kind, optimizer) in found:
                yield f"| {name} | {found[kind, optimizer]} |"


def rates_table(found: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """The learning rate's part, at a batch of 64."""
    yield "\n| rate at 64 over sqrt scaling's | 0.5 | 1 | 2 | constant 16 |\n|---|---|---|---|---|"
    for optimizer, label in OPTIMIZERS.items():
        kinds = [*(f"const64-x{factor}" for factor in ("0.5", "1", "2")), "const16-x1"]
        losses = [
            f"{fmean(found[kind, optimizer].losses):.3f}" if (kind, optimizer) in found else "-"
            for kind in kinds
        ]
        yield f"| {label} | {' | '.join(losses)} |"


def draw_policies(found: dict[tuple[str, str], Cell], path: Path) -> None:
    """Loss against steps: constant batches as a line, policies as points."""
    figure, rows = plt.subplots(1, 4, figsize=(11, 3.4), layout="constrained")
    for (optimizer, label), axes in zip(OPTIMIZERS.items(), rows, strict=True):
        kinds = [f"const{size}-x1" for size in (16, 32, 64, 128)]
        line = [found[kind, optimizer] for kind in kinds if (kind, optimizer) in found]
        steps = [fmean(cell.steps) for cell in line]
        axes.plot(steps, [fmean(c.losses) for c in line], "o-", color="#777777", label="constant")
        for color, (kind, name) in zip(COLORS, POLICIES.items(), strict=False):
            if cell := found.get((kind, optimizer)):
                error = stdev(cell.losses) if len(cell.losses) > 1 else 0.0
                axes.errorbar(
                    fmean(cell.steps),
                    fmean(cell.losses),
                    error,
                    fmt="D",
                    color=color,
                    label=name,
                    markersize=4,
                )
        axes.set(title=label, xlabel="steps", xscale="log")
        axes.set_xticks([100, 200, 400, 640], ["100", "200", "400", "640"])
        axes.minorticks_off()
    rows[0].set_ylabel("validation loss (nats per token)")
    handles, labels = rows[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def own(found: CriticalBatch) -> str:
    """The optimizer of a source."""
    return found.source.split("-")[1]


def agreement_table(points: list[CriticalBatch]) -> Iterator[str]:
    """Each estimate of each geometry against the critical batch by the fit, over all points."""
    yield "\n| geometry, estimate | points | rank correlation | median ratio to the fit | range |"
    yield "|---|---|---|---|---|"
    for name in sorted({name for point in points for name in point.noise_scales}):
        pairs = [
            (point.by_fit, point.noise_scales[name])
            for point in points
            if point.by_fit and name in point.noise_scales
        ]
        if len(pairs) < 3:
            continue
        ratios = sorted(scale / fit for fit, scale in pairs)
        ranks = pd.DataFrame(pairs).rank()
        middle = ratios[len(ratios) // 2]
        yield (
            f"| {name} | {len(pairs)} | {ranks[0].corr(ranks[1]):.2f} | {middle:.2g} | "
            f"{ratios[0]:.2g} to {ratios[-1]:.2g} |"
        )


def points_table(points: list[CriticalBatch]) -> Iterator[str]:
    estimates = ("plug_in", "debiased", "cross_fitted", "nested")
    columns = ["optimizer", "tokens", "tolerance", "20 % overhead", "fit", *estimates]
    yield f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    for point in points:
        geometry = "nuclear" if own(point) == "muon" else "manhattan"
        sizes = [point.by_tolerance, point.by_overhead, point.by_fit]
        sizes += [point.noise_scales.get(f"{geometry}/{estimate}") for estimate in estimates]
        shown = ["-" if size is None else f"{size:.0f}" for size in sizes]
        yield f"| {OPTIMIZERS[own(point)]} | {point.tokens:,} | {' | '.join(shown)} |"


def draw_points(points: list[CriticalBatch], path: Path) -> None:
    """What each batch costs at each point, an optimizer each."""
    figure, rows = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained", sharey=True)
    for (optimizer, label), axes in zip(OPTIMIZERS.items(), rows, strict=True):
        for color, point in zip(COLORS, (p for p in points if own(p) == optimizer), strict=False):
            best = min(branch.loss for branch in point.branches)
            axes.errorbar(
                [branch.batch_size for branch in point.branches],
                [branch.loss - best for branch in point.branches],
                [branch.standard_error or 0.0 for branch in point.branches],
                fmt="o-",
                color=color,
                markersize=4,
                capsize=2,
                label=f"at {point.tokens // 1024}k tokens: fit {point.by_fit or float('nan'):.0f}",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        axes.set(title=label, xlabel="batch size (sequences)")
        axes.legend(fontsize=7)
    rows[0].set_ylabel("loss above the best (nats per token)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> None:
    found = cells(folder)
    runs, damaged = runs_of_folders([folder])
    points = critical_batches(runs, tolerance=0.01)
    of_points = (points_table(points), agreement_table(points))
    for table in (*of_points, policies_table(found), rates_table(found)):
        print("\n".join(table))
    print(*damaged, sep="\n")
    with plt.rc_context(STYLE):
        draw_points(points, DOCS / "critical_batch_branches.png")
        draw_policies(found, DOCS / "critical_batch_policies.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
