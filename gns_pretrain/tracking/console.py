"""The console: a progress bar on a terminal, one line per interval elsewhere. Nobody parses it."""

import math
from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console as AnyConsole  # noqa: TID251  as a type alone
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from gns_pretrain.errors import counted, printable
from gns_pretrain.system import terminal
from gns_pretrain.tracking.jsonl import METRICS, SUMMARY
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.tracking.unit import TOKENS, Unit, unit_of

_REFRESHES_PER_SECOND = 4  # enough for the eye; the bar shares the cores with training
_SPEED_SECONDS = 3600.0  # that the time left goes by: evaluations are included
_FIRST_SECONDS = 5.0  # of a process, whose steps' own speed tells more
_NARROWEST_BAR, _USUAL_BAR = 4, 10  # columns, the second where the others are 80 or more
_SEPARATOR = "  "


class Part(NamedTuple):
    """A number that is shown while training; of a narrow bar the most important are left."""

    text: str
    importance: int
    style: str = ""


class ConsoleView:
    """Progress bar or lines for training; lines for validation and for the batch size.

    A bar names step, loss, speed and time left at 60 columns, and more the wider it is; of several
    noise scales, 3 letters of the geometry and its estimates in their order: man 5.8|71.2.

    Args:
        settings: `progress` chooses between bar and lines, `log_every` spaces the lines.
        budget: at which the run ends.
        unit: of the budget.
        run_directory: named in the closing table.
        console: where to print; None is standard output.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        *,
        budget: int,
        unit: Unit = TOKENS,
        run_directory: Path,
        console: terminal.Console | None = None,
    ) -> None:
        always = settings.progress == "always"
        self._console = console or terminal.Console(
            force_terminal=True if always else None, force_interactive=True if always else None
        )
        # rich alone takes FORCE_COLOR, which build servers set, for a terminal.
        on_terminal = self._console.is_interactive and self._console.file.isatty()
        self._shows_bar = always or (settings.progress == "auto" and on_terminal)
        self._log_every = settings.log_every
        self._budget = budget
        self._unit = unit
        self._run_directory = run_directory
        self._progress = Progress(
            _PartsColumn(self._console),
            BarColumn(bar_width=None),
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            speed_estimate_period=_SPEED_SECONDS,
            expand=True,
            disable=not self._shows_bar,
        )
        first = [Part("the first step ...", 0)]
        self._task = self._progress.add_task("", total=budget, parts=first)
        self._began: float | None = None  # time of this process's first training record
        self._is_styled = on_terminal
        self._has_logged = False
        self._noise_scales: dict[tuple[str, str], str] = {}  # by geometry and estimate

    def start(self) -> None:
        """Show the bar, if there is one, before the first step."""
        self._progress.start()

    def write(self, record: dict[str, Any]) -> None:
        """Show a record; a noise scale is shown with the next training line, a shadow is not."""
        if record["kind"] == "train":
            self._show_training(record)
        elif record["kind"] == "noise":
            name = (record["geometry"], record["estimate"])
            scale = record["noise_scale_ema"]
            self._noise_scales[name] = "undefined" if scale is None else f"{scale:.1f}"
        elif record["kind"] == "validation":
            loss = Part(f"validation loss {record['loss']:.4f}", 0, "bold green")
            parts = [*self._position(record, f"{self._unit.noun} "), loss]
            if "accuracy" in record:
                parts.append(Part(f"accuracy {record['accuracy']:.2%}", 1, "bold green"))
            self._show_line(parts)
        elif record["kind"] == "batch_size":
            target = "" if record["target"] is None else f": target {record['target']:.1f}"
            why = f", {record['why']}" if record.get("why") else ""
            self.message(
                f"batch size {record['from']:,} -> {record['to']:,} at step {record['step']:,}"
                f"{target}{why}; lr x{record['lr_multiplier']:.3f}"
            )

    def message(self, text: str) -> None:
        """Print one line above the bar, as it is: no markup, no wrapping."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def sync(self) -> None:
        """Do nothing: what is printed stays."""

    def finish(self, summary: dict[str, Any]) -> None:
        """End the bar and print the closing table."""
        self.close()
        for line in closing_table(summary, self._run_directory):
            self.message(line)

    def close(self, error: str = "") -> None:
        """End the bar, so that the terminal is usable again; a second call does nothing."""
        self._progress.stop()

    def _show_training(self, record: dict[str, Any]) -> None:
        left = self._advance(record)
        shows_line = not self._has_logged or record["step"] % self._log_every == 0
        if not self._shows_bar and not shows_line:
            return
        self._has_logged = True
        # null of a skipped step whose loss was not finite
        loss = "nan" if record["loss"] is None else f"{record['loss']:.3f}"
        parts = [
            *self._position(record, "" if self._shows_bar else f"{self._unit.noun} "),
            Part(f"loss {loss}", 1, "green"),
            Part(f"lr {record['lr']:.1e}", 7),
            Part(f"batch {record['batch_size']:,}", 4),
        ]
        if self._noise_scales:
            parts.append(Part(self._noise_text(), 5))
        speed = f"{short_number(record[self._unit.speed])} {self._unit.short}"
        parts.append(Part(speed, 2, "blue"))
        if "mfu" in record:
            parts.append(Part(f"mfu {record['mfu']:.1%}", 8, "magenta"))
        if "peak_memory_gib" in record:
            parts.append(Part(f"{record['peak_memory_gib']:.1f} GiB", 9, "yellow"))
        if left:
            whole = str(timedelta(seconds=math.ceil(left)))
            parts.append(Part(whole if self._shows_bar else f"{duration(left)} left", 3))
        if self._shows_bar:
            self._progress.start()
            self._progress.update(self._task, parts=parts)
        else:
            self._show_line(parts)

    def _advance(self, record: dict[str, Any]) -> float | None:
        """Follow a training record; return the seconds left, None where nothing says."""
        count, now = record[self._unit.name], self._console.get_time()
        if self._began is None:
            # The speed leaves out what the first update counts: a resumed run's took no time.
            self._began = now
            self._progress.reset(self._task)
        self._progress.update(self._task, completed=count)
        left = self._progress.tasks[0].time_remaining
        if left is None or now - self._began < _FIRST_SECONDS:
            speed = record[self._unit.speed]
            left = max(self._budget - count, 0) / speed if speed else None
        return left

    def _position(self, record: dict[str, Any], label: str) -> list[Part]:
        count = record[self._unit.name]
        done = f"{short_number(count)}/{short_number(self._budget)}"
        share = f"({100 * count / self._budget:.1f}%)"
        return [Part(f"step {record['step']:,}", 0, "cyan"), Part(f"{label}{done} {share}", 6)]

    def _noise_text(self) -> str:
        scales = list(self._noise_scales.items())
        if len(scales) == 1:
            return f"noise scale {scales[0][1]}"
        if not self._shows_bar:
            return f"noise scale {', '.join(f'{g} {e} {scale}' for (g, e), scale in scales)}"
        of_geometry = groupby(scales, key=lambda each: each[0][0])
        texts = (f"{g[:3]} {'|'.join(scale for _, scale in found)}" for g, found in of_geometry)
        return f"noise {' '.join(texts)}"

    def _show_line(self, parts: Iterable[Part]) -> None:
        line = joined(parts, " | ")
        self._console.print(line if self._is_styled else Text(line.plain), soft_wrap=True)


class _PartsColumn(ProgressColumn):
    """The most important parts that the terminal's width, whatever it is by now, has room for."""

    def __init__(self, console: AnyConsole) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        width = self._console.width
        bar = _USUAL_BAR if width >= 80 else _NARROWEST_BAR
        return joined(fitting(task.fields["parts"], width - bar - 1), _SEPARATOR)


def fitting(parts: Iterable[Part], width: int) -> list[Part]:
    """Leave out the least important parts, until the others fit into `width` columns."""
    kept: list[Part] = []
    parts = list(parts)
    for part in sorted(parts, key=lambda part: part.importance):
        more = [*kept, part]
        if sum(len(p.text) + len(_SEPARATOR) for p in more) - len(_SEPARATOR) <= width:
            kept = more
    return [part for part in parts if part in kept]


def joined(parts: Iterable[Part], separator: str) -> Text:
    """Return the parts as one line."""
    return Text(separator).join(Text(part.text, style=part.style) for part in parts)


def closing_table(summary: dict[str, Any], run_directory: Path) -> list[str]:
    """Format how a run ended, and where its record is; one line each."""
    validation, speed = "not measured", "no steps"
    if summary["validation_loss"] is not None:
        validation = (
            f"{summary['validation_loss']:.4f} (lowest {summary['minimum_validation_loss']:.4f} "
            f"at step {summary['minimum_validation_loss_step']:,})"
        )
    unit = unit_of(summary)
    if summary.get(unit.speed) is not None:
        speed = f"{short_number(summary[unit.speed])} {unit.short} (median step)"
    accuracy = []
    if "maximum_accuracy" in summary:
        accuracy = [f"  accuracy         highest {summary['maximum_accuracy']:.2%}"]
    return [
        f"{summary['state']}: {counted(summary['steps'], 'step')}, "
        f"{short_number(summary[unit.name])} {unit.noun}, "
        f"{duration(summary['seconds'])} of training",
        f"  validation loss  {validation}",
        *accuracy,
        f"  speed            {speed}",
        f"  run record       {run_directory / METRICS}",
        f"  summary          {run_directory / SUMMARY}",
    ]


def short_number(value: float, *, exact: bool = False) -> str:
    """Shorten to three digits and a unit: 999, 12.3k, 485M, 3.20B; `exact`: 500, 2.5k, 1M, 3.2B."""
    units = iter(("", "k", "M", "B", "T"))
    unit = next(units)
    while abs(value) >= (1000 if exact else 999.5) and unit != "T":  # 999.5 rounds to four digits
        value, unit = value / 1000, next(units)
    if exact:
        return f"{value:g}{unit}"
    # "#" keeps the zeros of 3.20B, and the point of 485M, which is removed.
    digits = f"{value:#.3g}".rstrip(".") if unit else f"{value:.0f}"
    return digits + unit


def duration(seconds: float) -> str:
    """Format with two units at most: 12.3 s, 2 min 31 s, 5 h 02 min."""
    if seconds < 59.95:  # from there one digit shows 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
