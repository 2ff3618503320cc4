"""The console: a progress bar on a terminal, one line per interval elsewhere. Nobody parses it."""

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gns_pretrain.errors import counted, printable
from gns_pretrain.system import terminal
from gns_pretrain.tracking.jsonl import METRICS, SUMMARY
from gns_pretrain.tracking.settings import MetricsSettings

_REFRESHES_PER_SECOND = 4  # enough for the eye; the bar shares the cores with training
_SPEED_SECONDS = 3600.0  # that the time left goes by: evaluations are included


class ConsoleView:
    """Progress bar or lines for training; lines for validation and for the batch size.

    Args:
        settings: `progress` chooses between bar and lines, `log_every` spaces the lines.
        token_budget: tokens at which the run ends.
        run_directory: named in the closing table.
        console: where to print; None is standard output.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        *,
        token_budget: int,
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
        self._token_budget = token_budget
        self._run_directory = run_directory
        self._bar: Progress | None = None
        self._has_logged = False
        self._noise_scales: dict[str, str] = {}  # by geometry and estimate

    def write(self, record: dict[str, Any]) -> None:
        """Show a record; a noise scale is shown with the next training line, a shadow is not."""
        if record["kind"] == "train":
            self._show_training(record)
        elif record["kind"] == "noise":
            name = f"{record['geometry']} {record['estimate']}"
            scale = record["noise_scale_ema"]
            self._noise_scales[name] = "undefined" if scale is None else f"{scale:.1f}"
        elif record["kind"] == "validation":
            self.message(
                f"step {record['step']:,} | tokens {self._tokens_text(record['tokens'])} | "
                f"validation loss {record['loss']:.4f}"
            )
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

    def finish(self, summary: dict[str, Any]) -> None:
        """End the bar and print the closing table."""
        self.close()
        for line in closing_table(summary, self._run_directory):
            self.message(line)

    def close(self, error: str = "") -> None:
        """End the bar, so that the terminal is usable again; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_training(self, record: dict[str, Any]) -> None:
        parts = [
            f"tokens {self._tokens_text(record['tokens'])}",
            # null of a skipped step whose loss was not finite
            "loss nan" if record["loss"] is None else f"loss {record['loss']:.3f}",
            f"lr {record['lr']:.1e}",
            f"batch {record['batch_size']:,}",
        ]
        if len(self._noise_scales) == 1:
            parts += [f"noise scale {scale}" for scale in self._noise_scales.values()]
        elif self._noise_scales:
            named = (f"{name} {scale}" for name, scale in self._noise_scales.items())
            parts.append(f"noise scale {', '.join(named)}")
        parts.append(f"{short_number(record['tokens_per_second'])} tok/s")
        if self._shows_bar:
            self._advance_bar(record["tokens"], "  ".join(parts).removeprefix("tokens "))
        elif not self._has_logged or record["step"] % self._log_every == 0:
            self.message(" | ".join([f"step {record['step']:,}", *parts]))
            self._has_logged = True

    def _advance_bar(self, tokens: int, status: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                speed_estimate_period=_SPEED_SECONDS,
                expand=True,
            )
            # Tokens before this point may be those of a run that was resumed: they took no time.
            self._bar.add_task("", total=self._token_budget, completed=tokens, status="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=tokens, status=status)

    def _tokens_text(self, tokens: int) -> str:
        percent = 100 * tokens / self._token_budget
        return f"{short_number(tokens)}/{short_number(self._token_budget)} ({percent:.1f}%)"


def closing_table(summary: dict[str, Any], run_directory: Path) -> list[str]:
    """Format how a run ended, and where its record is; one line each."""
    validation, speed = "not measured", "no steps"
    if summary["validation_loss"] is not None:
        validation = (
            f"{summary['validation_loss']:.4f} (lowest {summary['minimum_validation_loss']:.4f} "
            f"at step {summary['minimum_validation_loss_step']:,})"
        )
    if summary["tokens_per_second"] is not None:
        speed = f"{short_number(summary['tokens_per_second'])} tok/s (median step)"
    return [
        f"{summary['state']}: {counted(summary['steps'], 'step')}, "
        f"{short_number(summary['tokens'])} tokens, "
        f"{duration(summary['seconds'])} of training",
        f"  validation loss  {validation}",
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
