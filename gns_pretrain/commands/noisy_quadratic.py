"""Try batch sizes and policies on a noisy quadratic, whose losses are known (arXiv:1907.04164).

    gns-pretrain noisy-quadratic --out quadratic.png
    gns-pretrain noisy-quadratic --only policies --geometry manhattan --theta 0.5
    gns-pretrain noisy-quadratic --only steps --dimension 10000

First the steps to a target loss against the batch size: SGD, with momentum, and preconditioned,
each at its best learning rate. Then policies of SGD at equal samples: each at its best learning
rate, beside a constant batch and the best schedule that take as many steps. With the settings of a
policy, as a run has them under `batch_size`, that one is ranked beside constant batches; it is
`adaptive` unless --policy names another.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from gns_pretrain.batch_size import PolicySettings
from gns_pretrain.errors import needs
from gns_pretrain.fields import add_options, from_options, path_argument, script_parser
from gns_pretrain.quadratic import NoisyQuadratic, QuadraticSettings
from gns_pretrain.quadratic.experiments import (
    RULES,
    RankingSettings,
    Result,
    Scaling,
    frontier,
    ranking,
    scaling,
)
from gns_pretrain.system.terminal import Console, write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    add_options(parser, QuadraticSettings)
    option("--target-loss", type=float, default=0.01, help="of the first part (default: 0.01)")
    add_options(parser, RankingSettings)
    add_options(parser, PolicySettings, show_defaults=False)
    option("--only", choices=("steps", "policies"), help="one of the two parts")
    option("--out", type=path_argument, help="figure to write: file.png or file.pdf")
    option("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    torch.set_num_threads(1)  # for tensors as small as these
    problem = from_options(QuadraticSettings, options).build()
    settings = from_options(RankingSettings, options)
    policies = settings.policies
    if vars(options).keys() & PolicySettings.__annotations__.keys():
        given = {"policy": "adaptive"} | vars(options)
        policy = from_options(PolicySettings, argparse.Namespace(**given))
        policy.check("--")
        constant = {name: each for name, each in policies.items() if name.startswith("constant")}
        policies = constant | {policy.label: (settings.batch_size, policy)}
    curves, ranked = [], {}
    if options.only != "policies":
        curves = [scaling(problem, rule, target=options.target_loss) for rule in RULES]
    if options.only != "steps":
        ranked = ranking(problem, settings, policies)
    if options.json:
        results = [{"policy": name} | asdict(result) for name, result in ranked.items()]
        write(json.dumps({"steps": list(map(asdict, curves)), "policies": results}))
    if curves and not options.json:
        title = (
            f"steps to a loss of {options.target_loss:g}, at the best learning rate of each batch"
        )
        headers = "rule|least steps|least samples|critical batch|noise scale at start|at the target"
        print_table(title, headers, [row_of_steps(curve) for curve in curves])
    if ranked and not options.json:
        title = f"SGD after {settings.samples:,} samples, {settings.schedule} learning rate"
        headers = (
            "policy|peak lr|steps|time|last batch|loss|standard error|constant, same steps"
            "|best, same steps|loss / best"
        )
        print_table(title, headers, [row_of_policy(*named) for named in ranked.items()])
    if options.out:  # last, so that a path that cannot be written costs the figure alone
        draw(options.out, problem, settings, curves, ranked)


def row_of_steps(curve: Scaling) -> list[str]:
    numbers = (curve.least_steps, curve.least_samples, curve.critical_batch, *curve.noise_scales)
    return [curve.rule, *(f"{number:,.0f}" for number in numbers)]


def row_of_policy(name: str, result: Result) -> list[str]:
    error = "exact" if result.error is None else f"{result.error:.2g}"
    counts = [f"{count:,.0f}" for count in (result.steps, result.time, result.last_batch)]
    losses = [f"{loss:.3g}" for loss in (result.loss, result.constant, result.best)]
    losses.insert(1, error)
    return [name, f"{result.lr:.3g}", *counts, *losses, f"{result.excess:.3g}"]


def print_table(title: str, headers: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headers, which | separates; the first column is text."""
    table = Table(title=title, title_justify="left")
    for number, header in enumerate(headers.replace(" ", "\n").split("|")):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


def draw(
    path: Path,
    problem: NoisyQuadratic,
    settings: RankingSettings,
    curves: Sequence[Scaling],
    ranked: Mapping[str, Result],
) -> None:
    """Draw the parts that there are.

    Left, steps to the target, dotted the two asymptotes, which meet at the critical batch. Right,
    loss against steps: constant batches and best schedules as lines, other policies as points.
    """
    with needs("figures", "figures are drawn with matplotlib"):
        import matplotlib

        from gns_pretrain.results.figures import COLORS, STYLE, save
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = bool(curves) + bool(ranked)
    with pyplot.rc_context(STYLE):
        figure, grid = pyplot.subplots(
            1, panels, figsize=(4.6 * panels, 3.6), squeeze=False, layout="constrained"
        )
        left, right = grid[0, 0], grid[0, -1]
        for curve, color in zip(curves, COLORS, strict=False):
            sizes, steps, _ = zip(*curve.points, strict=True)
            limits = [max(curve.least_samples / size, curve.least_steps) for size in sizes]
            left.loglog(sizes, steps, color=color, label=curve.rule)
            left.loglog(sizes, limits, ":", color=color, lw=1)
            left.loglog(curve.critical_batch, curve.least_steps, "v", color=color)
            left.set(xlabel="batch size (sequences)", ylabel="steps to the target loss")
            left.legend()
        if ranked:
            octaves = torch.linspace(-5, 0, 11, dtype=torch.float64)
            counts = 2**octaves * settings.samples / settings.batch_size
            constant, best = frontier(problem, settings, counts)
            right.loglog(counts, constant, color="0.5", label="constant batch")
            right.loglog(counts, best, color="black", label="best schedule")
            top = 1.2 * max(constant)  # what has diverged is left out
            points = [
                (name, each)
                for name, each in ranked.items()
                if not name.startswith("constant") and each.loss < top
            ]
            for number, (name, one) in enumerate(points):
                look = {"marker": "osD^vPX*<>"[number % 10], "color": COLORS[number % len(COLORS)]}
                right.errorbar(
                    one.steps, one.loss, one.error, linestyle="", ms=5, label=name, **look
                )
            right.set(xlabel="steps", ylabel=f"loss after {settings.samples:,} samples")
            right.set_ylim(min(best) / 1.2, top)
            right.legend(fontsize=6.5)
        save(figure, path)
        pyplot.close(figure)
