"""What a search over settings found (arXiv:2602.03001, Table 5): its points, the best one first."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from rich import box

from gns_pretrain.config.schema import TunedSettings
from gns_pretrain.errors import InputError, counted
from gns_pretrain.results.frame import Runs, pd, shown_score, with_losses
from gns_pretrain.results.layouts import Score
from gns_pretrain.results.render import markdown, score_text, text_grid
from gns_pretrain.runs.identity import Purpose, varying_settings

# What a search goes by, by the runs' setting `table`.
SEARCHES: dict[str, Score] = {"tune": "loss", "tune_imagewoof": "loss", "tune_cifar10": "accuracy"}
BEST_OF: dict[Score, str] = {
    "loss": "lowest validation loss",
    "accuracy": "highest validation accuracy (%)",
}


@dataclass(frozen=True)
class Search:
    """One optimizer's search at one scale.

    `points` has a row for each finished point, the best first: the settings that differ between
    points, by dotted name; `score` (a loss in nats or an accuracy in percent, mean over seeds of
    the best) and its `deviation` (None for one seed); all `settings` of one of its runs.
    """

    name: str  # of SEARCHES
    optimizer: str  # name of its group in a scale
    scale: str
    points: pd.DataFrame
    unfinished: int  # runs that do not count yet
    damaged: list[str]  # a line for each run that cannot be read

    @property
    def searched(self) -> list[str]:
        return [name for name in self.points if name not in ("score", "deviation", "settings")]

    @property
    def at_an_end(self) -> list[str]:
        """Settings whose best value is the smallest or the largest of all that were tried."""
        ends = []
        for name in self.searched:
            tried = list(self.points[name])
            if all(isinstance(value, int | float) for value in tried) and min(tried) < max(tried):
                for end, value in (("smallest", min(tried)), ("largest", max(tried))):
                    if tried[0] == value:
                        ends.append(f"{name}={value} is the {end} that was tried")
        return ends

    @property
    def for_the_scale(self) -> dict[str, Any]:
        """The best point's numbers as conf/scale/<scale>.yaml names them."""
        best = self.points["settings"].iloc[0]
        keys = {
            field.name: f"optimizer.{field.name.replace('adamw_lr', 'adamw.lr')}"
            for field in fields(TunedSettings)
        }
        # signSGD is Signum at a momentum of 0, which no scale holds.
        return {name: best[key] for name, key in keys.items() if best.get(key)}

    @property
    def notes(self) -> list[str]:
        """What to do with it."""
        best = ", ".join(f"{name}: {_shown(value)}" for name, value in self.for_the_scale.items())
        workload = self.name.removeprefix("tune").removeprefix("_") or "language"
        file = f"conf/scale/{self.scale}/{workload}.yaml"
        notes = [f"for {file}: scale.{self.optimizer}: {{{best}}}"]
        notes += [f"{end}: search on beyond it" for end in self.at_an_end]
        if self.unfinished:
            notes.append(f"not counted, unfinished: {counted(self.unfinished, 'run')}")
        return notes + self.damaged

    @property
    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, headers, and the cells of each point as texts."""
        score = SEARCHES[self.name]
        title = f"{self.optimizer} at scale={self.scale}: {counted(len(self.points), 'point')}"
        lines = [
            [*map(_shown, point[self.searched]), score_text(point.score, point.deviation, score)]
            for _, point in self.points.iterrows()
        ]
        return title, [*self.searched, BEST_OF[score]], lines


def searches(runs: Runs) -> list[Search]:
    """The searches that these runs belong to, by scale and optimizer.

    Raises:
        InputError: none of them is a search's, or no run of one is finished.
    """
    own = runs[runs["table"].isin(SEARCHES)]
    if own.empty:
        raise InputError(
            f"none of {counted(len(runs), 'run')} belongs to a search; "
            "start one with gns-pretrain train +sweep=tune_signum scale=..."
        )
    groups = own.groupby(["table", "scale", "cell"])
    return [
        _search(table, scale, optimizer, of_search)
        for (table, scale, optimizer), of_search in groups
    ]


def _search(table: str, scale: str, optimizer: str, runs: Runs) -> Search:
    finished = runs[runs["finished"]]
    if finished.empty:
        raise InputError(
            f"no run of {optimizer}'s search at scale={scale} is finished; start its command again"
        )
    score = SEARCHES[table]
    finished, damaged = with_losses(finished, score)
    searched = varying_settings(list(finished["settings"]), Purpose.CURVE)
    points = []
    key = finished["settings"].map(lambda each: repr([each.get(name) for name in searched]))
    for _, seeds in finished.groupby(key, sort=False):
        lowest = [losses.min() for losses in seeds["losses"]]
        spread = stdev(lowest) if len(lowest) > 1 else None
        first = seeds["settings"].iloc[0]
        mean = shown_score(score, fmean(lowest))
        results = {"score": mean, "deviation": spread, "settings": first}
        points.append({name: first.get(name) for name in searched} | results)
    in_order = pd.DataFrame(points, dtype=object).sort_values(
        "score", kind="stable", ascending=score == "loss"
    )
    return Search(table, optimizer, scale, in_order, int((~runs["finished"]).sum()), damaged)


def as_text(search: Search) -> str:
    """For a terminal."""
    title, headers, lines = search.table
    grid = text_grid(headers, lines, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    return "\n".join([grid, "", *search.notes, ""])


def as_markdown(search: Search) -> str:
    return markdown(*search.table, search.notes)


FORMATS: dict[str, Callable[[Search], str]] = {"text": as_text, "markdown": as_markdown}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
