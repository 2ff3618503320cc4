"""Train the runs of docs/howto/transfer.md and make its tables and picture from them.

python docs/generate/transfer.py outputs/transfer         what the page shows; 15 minutes of a core
python docs/generate/transfer.py outputs/transfer adamw   one optimizer alone

Learning rates are a factor of 2 apart, from a first guess on until the best has a neighbor on
either side; a parabola through these three gives the rate that the table names. Finished runs are
not trained again.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
from hydra import compose, initialize_config_dir
from matplotlib.ticker import LogLocator, NullFormatter

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.launch.train import launch
from gns_pretrain.results.figures import COLORS, STYLE
from gns_pretrain.runs.directory import read_summary

DOCS = Path(__file__).parents[1]
BASE = 64  # width at which both parametrizations are the same
MODEL = (
    "model=demo model.num_layers=2 model.dim={width} model.num_heads={heads} "
    "model.num_kv_heads={heads} model.ffn_dim={ffn_dim}"
)
RUN = (
    "token_budget=51200 data.sequence_length=64 data.embedded_vocab_size=512 micro_batch_size=8 "
    "batch_size.initial=8 evaluation.every_tokens=51200 evaluation.num_sequences=128 "
    "checkpoint.every_steps=100 metrics.progress=never launch.device=cpu launch.threads=1"
)


@dataclass(frozen=True)
class Optimizer:
    """What is searched for one optimizer."""

    label: str
    settings: str
    first: float  # learning rate that the search begins with at the base width
    widths: tuple[int, ...]


OPTIMIZERS = {
    "adamw": Optimizer("AdamW", "optimizer=adamw", 1.6e-2, (64, 128, 256, 512)),
    "signum": Optimizer("Signum", "optimizer=signum optimizer.momentum=0.8", 4e-3, (64, 256)),
    # The rest's AdamW at the ratio of scale=demo's searched rates.
    "muon": Optimizer(
        "Muon",
        "optimizer=muon optimizer.momentum=0.9 optimizer.adamw.lr={adamw_lr:g}",
        8e-2,
        (64, 256),
    ),
}
Losses = dict[float, float]  # last validation loss by learning rate; infinite where it diverged


def words_of(optimizer: str, parametrization: str, width: int, lr: float) -> list[str]:
    """The settings of one run, as `python train.py` takes them."""
    text = f"{MODEL} {OPTIMIZERS[optimizer].settings} {RUN}".format(
        width=width, heads=width // 16, ffn_dim=2 * width, adamw_lr=0.8 * lr
    )
    name = f"{optimizer}-{parametrization}-w{width}-lr{lr:g}"
    return [
        *text.split(),
        f"optimizer.lr={lr:g}",
        f"model.parametrization={parametrization}",
        f"run_name={name}",
    ]


def loss_of(folder: Path, *run: object) -> float:
    """Train a run, unless it is finished; return its last validation loss."""
    words = [*words_of(*run), f"output_directory={folder}"]  # type: ignore[arg-type]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = settings_from(compose("train", words), words)
    with redirect_stdout(StringIO()):
        code = launch(config)
    if code == 75:  # asked to stop
        sys.exit(code)
    return math.inf if code else read_summary(folder / config.run_name)["validation_loss"]


def search(folder: Path, optimizer: str, parametrization: str, width: int) -> Losses:
    """Halve and double until the best learning rate has neighbors."""
    shown = "standard" if width == BASE else parametrization
    first = OPTIMIZERS[optimizer].first
    if parametrization == "standard":
        first /= 2 ** round(math.log2(width / BASE) / 2)  # it will move: begin on its way
    losses: Losses = {}
    due = [first, first * 2, first / 2]
    while due:
        for lr in due:
            losses[lr] = loss_of(folder, optimizer, shown, width, lr)
            print(f"{optimizer} {shown} {width} {lr:g}: {losses[lr]:.4f}", flush=True)
        best = min(losses, key=losses.__getitem__)
        due = [lr for lr in (best / 2, best * 2) if lr not in losses]
    return dict(sorted(losses.items()))


def best_rate(losses: Losses) -> float:
    """Learning rate of the lowest loss, by a parabola through the best and its neighbors."""
    best = min(losses, key=losses.__getitem__)
    low, middle, high = losses[best / 2], losses[best], losses[best * 2]
    if math.inf in (low, high):
        return best
    return best * 2 ** (0.5 * (low - high) / (low - 2 * middle + high))


def table(found: dict[str, dict[tuple[str, int], Losses]]) -> Iterator[str]:
    """Best rates by width, beside that of the base."""
    yield "| optimizer | parametrization | width | best learning rate | of the base's | loss |"
    yield "|---|---|---:|---:|---:|---:|"
    for optimizer, searches in found.items():
        for (parametrization, width), losses in searches.items():
            rate, base = best_rate(losses), best_rate(searches[parametrization, BASE])
            label = OPTIMIZERS[optimizer].label
            lowest = min(losses.values())
            yield (
                f"| {label} | {parametrization} | {width} | {rate:.2g} | {rate / base:.2f} | "
                f"{lowest:.3f} |"
            )


def draw(found: dict[str, dict[tuple[str, int], Losses]], path: Path) -> None:
    """Loss against learning rate, a line a width; a mark at each best one."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(found), 2, figsize=(7.2, 2.5 * len(found)), squeeze=False, sharex="row",
            sharey="row", layout="constrained",
        )  # fmt: skip
        for row, (optimizer, searches) in zip(grid, found.items(), strict=True):
            for axes, parametrization in zip(row, ("standard", "mup"), strict=True):
                for color, width in zip(COLORS, OPTIMIZERS[optimizer].widths, strict=False):
                    losses = searches[parametrization, width]
                    points = {lr: loss for lr, loss in losses.items() if loss < math.inf}
                    axes.semilogx(*zip(*points.items(), strict=True), "o-", color=color, ms=3)
                    axes.plot(
                        best_rate(losses), min(points.values()), "v", color=color, label=f"{width}"
                    )
                label = "muP" if parametrization == "mup" else parametrization
                axes.set_title(f"{OPTIMIZERS[optimizer].label}, {label}")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            row[0].set_ylabel("validation loss (nats)")
            row[0].legend(title="width")
        for axes in grid[-1]:
            axes.set_xlabel("learning rate")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    folder, *chosen = sys.argv[1:]
    register_configs()
    found = {
        optimizer: {
            (parametrization, width): search(Path(folder), optimizer, parametrization, width)
            for width in OPTIMIZERS[optimizer].widths
            for parametrization in ("standard", "mup")
        }
        for optimizer in chosen or OPTIMIZERS
    }
    print(*table(found), sep="\n")
    draw(found, DOCS / "howto" / "transfer.png")


if __name__ == "__main__":
    main()
