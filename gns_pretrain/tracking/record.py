"""Everything a run records, in one place: the loop calls Record and formats and times nothing.

metrics.jsonl comes first and is the record; the console, W&B and TensorBoard are views of it.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gns_pretrain.errors import one_line
from gns_pretrain.system.files import must_write
from gns_pretrain.tracking.console import ConsoleView
from gns_pretrain.tracking.jsonl import (
    METRICS,
    SUMMARY,
    JsonLines,
    Line,
    last_record,
    read_records,
    summarize,
    truncate_after_step,
    write_summary,
)
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.tracking.unit import TOKENS, Unit
from gns_pretrain.tracking.views import (
    WAIT_SECONDS,
    MayFail,
    TensorboardView,
    View,
    as_shown,
)
from gns_pretrain.tracking.wandb import WandbView, upload_in_process


class Record:
    """The record of a run and its views. Only the main process writes; elsewhere all is a no-op.

    Args:
        run_directory: holds metrics.jsonl, summary.json and what the views write.
        settings: which views, and how often.
        is_main: whether this process is the one that writes.
        resume_step: step of the checkpoint the run resumes from; 0 starts a run. Lines of later
            steps are cut from metrics.jsonl: they will be written again.
        config: the whole configuration, for W&B.
        hparams: settings by dotted name, for TensorBoard's table of runs.
        budget: at which the run ends.
        unit: of the budget and of the views' axes.
        run_id: W&B's name of the run, from its run.json; read on the main process alone.
    """

    def __init__(
        self,
        run_directory: Path,
        settings: MetricsSettings,
        *,
        is_main: bool,
        resume_step: int,
        config: dict[str, Any],
        budget: int,
        unit: Unit = TOKENS,
        run_id: str,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_directory = run_directory
        self._path = run_directory / METRICS
        self._lines: JsonLines | None = None
        self._console: ConsoleView | None = None
        self._views: list[View] = []
        if not is_main:
            return
        run_directory.mkdir(parents=True, exist_ok=True)
        # Without a checkpoint even a validation before the first step comes again.
        truncate_after_step(self._path, resume_step if resume_step > 0 else -1)
        self._lines = JsonLines(self._path)
        self._console = ConsoleView(settings, budget=budget, unit=unit, run_directory=run_directory)
        self._views = [self._console]
        if settings.wandb.enabled:
            wandb = partial(
                WandbView,
                run_directory,
                settings.wandb,
                config=config,
                run_id=run_id,
                log=self.message,
                records=read_records(self._path),
            )
            upload = lambda summary: upload_in_process(run_directory, WAIT_SECONDS)  # noqa: E731
            self._views.append(MayFail("W&B", wandb, self.message, fill_in=upload))
        if settings.tensorboard:
            position = last_record(self._path, kind="train").get(unit.name, 0)
            tensorboard = partial(TensorboardView, run_directory, hparams=hparams or {}, unit=unit)
            self._views.append(
                MayFail(
                    "TensorBoard",
                    partial(tensorboard, resume_from=position),
                    self.message,
                    fill_in=lambda summary: self._plot_all(tensorboard(resume_from=0), summary),
                )
            )

    def start(self) -> None:
        """Show that the run begins; whoever calls this calls `close`, too."""
        if self._console is not None:
            self._console.start()

    def write(self, line: Line) -> None:
        """Write one line, then show it.

        A number that is not finite becomes null, since JSON has no infinity.
        """
        if self._lines is None:
            return
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.as_record().items()
        }
        self._lines.write(record)
        for view in self._views:
            view.write(as_shown(record))

    def message(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self._console is not None:
            self._console.message(text)

    def sync(self) -> None:
        """Put every line on disk: a checkpoint must not outlive the lines that lead to it.

        Raises:
            TrainingError: the disk is full or gone.
        """
        if self._lines is not None:
            with must_write(self._path):
                self._lines.sync()
        for view in self._views:
            view.sync()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, send it to the views and print the closing table.

        Args:
            summary: fields added to those of `summarize`, or put in place of them.
        """
        if self._lines is None:
            return
        full = {"state": "finished", **summarize(read_records(self._path)), **summary}
        with must_write(self._run_directory / SUMMARY):
            write_summary(self._run_directory / SUMMARY, full)
        # The console was opened first and comes last: the run ends with its closing table.
        for view in reversed(self._views):
            view.finish(full)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(one_line(error) if isinstance(error, Exception) else "")

    def close(self, error: str = "") -> None:
        """Stop writing, also after an error, which views show; a second call does nothing."""
        for view in reversed(self._views):
            view.close(error)
        self._views = []
        if self._lines is not None:
            self._lines.close()

    def _plot_all(self, view: View, summary: dict[str, Any]) -> None:
        for record in read_records(self._path):
            view.write(as_shown(record))
        view.finish(summary)
        view.close()
