"""A Weights & Biases view of the run record, and how its runs are read back.

W&B holds nothing that metrics.jsonl lacks.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gns_pretrain.errors import InputError, needs
from gns_pretrain.tracking.settings import WandbSettings
from gns_pretrain.tracking.views import axes, series

# The longest wait for an answer to the login question, for the server at the start, and for the
# upload at the end.
_TIMEOUT_SECONDS = 60
DEFAULT_PROJECT = "gns-pretrain"


class WandbView:
    """One row per step, which carries trainer/step, trainer/tokens and trainer/samples as axes.

    Records of one step (training, noise scale, validation) are gathered into one row, which is
    logged when the next step begins: whatever was measured has all three axes. W&B's own step is
    not used, because it drops what goes backwards, and a resumed run does.

    Args:
        run_directory: W&B writes its files to `wandb/` under it.
        settings: project, group, tags and so on.
        config: the whole configuration.
        run_id: the same each time the run resumes, so that its curves continue.
    """

    def __init__(
        self, run_directory: Path, settings: WandbSettings, *, config: dict[str, Any], run_id: str
    ) -> None:
        self._row: dict[str, float] = {}
        self._exit_code = 1  # a run that ends before finish() shows as failed
        self._is_open = True
        try:
            self._run = self._start(run_directory, settings, config=config, run_id=run_id)
        except BaseException:
            self._end_service()
            raise

    def _start(
        self, run_directory: Path, settings: WandbSettings, *, config: dict[str, Any], run_id: str
    ) -> Any:
        import wandb

        # The question for an account on a terminal reads this limit from the global settings only.
        wandb.setup(settings=wandb.Settings(login_timeout=_TIMEOUT_SECONDS))
        run = wandb.init(
            dir=str(run_directory),
            # What is None here is W&B's to choose, by its environment variables and settings files.
            project=settings.project or unless_set("WANDB_PROJECT", DEFAULT_PROJECT),
            entity=settings.entity,
            group=settings.group,
            job_type=settings.job_type,
            tags=list(settings.tags) or None,
            name=settings.name or unless_set("WANDB_NAME", run_directory.name),
            mode=cast(Literal["online", "offline", "disabled"] | None, settings.mode),
            config=config,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(
                quiet=True,
                # Its metadata would upload every variable that begins with SLURM_, a job's token
                # among them, the command line, the user's e-mail and the machine's paths.
                x_disable_meta=True,
                # The bar's cursor movements would garble the log that W&B takes of the console.
                console="off" if sys.stdout.isatty() else "auto",
                init_timeout=_TIMEOUT_SECONDS,
                finish_timeout=_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("trainer/step")
        run.define_metric("*", step_metric="trainer/step")
        run.define_metric("val/loss", step_metric="trainer/step", summary="min")
        return run

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to its step's row."""
        if self._row and record["step"] != self._row["trainer/step"]:
            self._log_row()
        self._row |= axes(record) | series(record)

    def finish(self, summary: dict[str, Any]) -> None:
        """Put the summary under final/ and upload; TimeoutError after a minute."""
        self._log_row()
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._exit_code = 0
        self.close()

    def close(self) -> None:
        """Log the last row, end the run and W&B's process; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._log_row()
            self._run.finish(exit_code=self._exit_code)
        finally:
            self._end_service()

    def _end_service(self) -> None:
        """End W&B's process here, where somebody else keeps the time: as Python exits, W&B waits
        for it without a limit, and prints a traceback where it has died.
        """
        with suppress(Exception, SystemExit):
            import wandb

            wandb.teardown(exit_code=self._exit_code)

    def _log_row(self) -> None:
        row, self._row = self._row, {}  # one that fails is not logged again by close()
        if row:
            self._run.log(row)


def unless_set(variable: str, default: str) -> str | None:
    """A default of ours, or None where the environment has a value, which W&B then takes."""
    return None if os.environ.get(variable) else default


@dataclass(frozen=True)
class TrackedRun:
    """A run as W&B has it."""

    name: str  # shown in the web
    config: dict[str, Any]  # the whole configuration, nested
    finished: bool  # it has spent its token budget: not running, failed or killed
    steps: int  # optimizer steps; 0 unless finished
    remote: Any  # the run of wandb's public API

    def validation(self) -> list[tuple[int, float]]:
        """Read steps and validation losses (nats per token) of its complete history."""
        import wandb

        keys = ["trainer/step", "val/loss"]
        points: list[tuple[int, float]] = []
        try:
            for row in self.remote.scan_history(keys=keys):
                # What a resumed run repeated replaces what it did before.
                while points and points[-1][0] >= row["trainer/step"]:
                    points.pop()
                points.append((row["trainer/step"], row["val/loss"]))
        except (wandb.Error, ValueError, OSError) as error:
            raise _unreadable(f"the history of {self.name}", error) from error
        return points


def tracked_runs(project: str, *, filters: Mapping[str, Any] | None = None) -> list[TrackedRun]:
    """Read the runs of a project, through W&B's public API.

    Args:
        project: entity/project, or a project of the account's default entity.
        filters: as the API's, e.g. {"config.table": "table2"}.

    Raises:
        InputError: wandb is not installed, or the project cannot be read.
    """
    with needs("tracking", "W&B is not installed"):
        import wandb
    try:
        remote = wandb.Api(timeout=_TIMEOUT_SECONDS).runs(
            project, filters=dict(filters or {}), per_page=200, lazy=False
        )
        runs = []
        for run in remote:
            steps = run.summary.get("final/steps")
            finished = run.state == "finished" and steps is not None
            runs.append(TrackedRun(run.name, dict(run.config), finished, int(steps or 0), run))
        return runs
    except (wandb.Error, ValueError, OSError) as error:
        raise _unreadable(f"project {project}", error) from error


def _unreadable(what: str, error: Exception) -> InputError:
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return InputError(
        f"W&B: {what} cannot be read ({reason}); check its name, the network, and `wandb login`"
    )
