"""A Weights & Biases view of the run record; nothing is kept here that metrics.jsonl lacks."""

import sys
from pathlib import Path
from typing import Any, Literal, cast

from gns_pretrain.metrics.series import axes, series
from gns_pretrain.metrics.settings import WandbSettings

# The longest wait for an answer to the login question, for the server at the start, and for the
# upload at the end.
_TIMEOUT_SECONDS = 60


class WandbView:
    """One row a step, which carries trainer/step, trainer/tokens and trainer/samples as axes.

    Records of one step (training, noise scale, validation) are gathered into one row, which is
    logged when the next step begins: whatever was measured has all three axes. W&B's own step is
    not used, because it drops what goes backwards, and a resumed run does.

    Args:
        run_directory: W&B writes its files to `wandb/` under it.
        settings: Project, group, tags and so on.
        config: The whole configuration.
        run_id: The same for the same configuration, so that a resumed run goes on in its curves.
    """

    def __init__(
        self, run_directory: Path, settings: WandbSettings, *, config: dict[str, Any], run_id: str
    ) -> None:
        import wandb

        self._row: dict[str, float] = {}
        self._exit_code = 1  # a run that ends before finish() shows as failed
        # The question for an account on a terminal reads this limit from the global settings only.
        wandb.setup(settings=wandb.Settings(login_timeout=_TIMEOUT_SECONDS))
        self._run = wandb.init(
            dir=str(run_directory),
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=settings.job_type,
            tags=list(settings.tags),
            name=settings.name or run_directory.name,
            mode=cast(Literal["online", "offline", "disabled"], settings.mode),
            config=config,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(
                quiet=True,
                # The bar's cursor movements would garble the log that W&B takes of the console.
                console="off" if sys.stdout.isatty() else "auto",
                init_timeout=_TIMEOUT_SECONDS,
                finish_timeout=_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")
        self._run.define_metric("val/loss", step_metric="trainer/step", summary="min")

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to its step's row."""
        if self._row and record["step"] != self._row["trainer/step"]:
            self._log_row()
        self._row |= axes(record) | series(record)

    def finish(self, summary: dict[str, Any]) -> None:
        """Put the summary under final/ and upload; gives up after a minute (TimeoutError)."""
        self._log_row()
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._exit_code = 0
        self.close()

    def close(self) -> None:
        """Log the last row and end the run; a second call does nothing."""
        self._log_row()
        self._run.finish(exit_code=self._exit_code)

    def _log_row(self) -> None:
        if self._row:
            self._run.log(self._row)
            self._row = {}
