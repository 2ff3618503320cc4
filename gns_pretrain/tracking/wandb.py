"""A Weights & Biases view of the run record, and how its runs are read back.

W&B holds nothing that metrics.jsonl lacks.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gns_pretrain.errors import InputError, TrainingError, needs
from gns_pretrain.system.processes import python_command, python_environment
from gns_pretrain.tracking.settings import WandbSettings
from gns_pretrain.tracking.unit import unit_of_settings
from gns_pretrain.tracking.views import as_shown, axes, series

# The longest wait for an answer to the login question, for the server at the start, and for the
# upload at the end.
_TIMEOUT_SECONDS = 60
DEFAULT_PROJECT = "gns-pretrain"
UPLOAD = "upload-wandb"  # the command
ABOUT = "run"  # of W&B's configuration: what a run is beside its settings


class WandbView:
    """One row per step, which carries trainer/step, trainer/tokens and trainer/samples as axes.

    Tokens, or images, are the x-axis of every chart until another one is chosen: at one step, runs
    of different batch sizes have seen different amounts of data.

    Records of one step (training, noise scale, validation) are gathered into one row, which is
    logged when the next step begins: whatever was measured has all three axes. W&B's own step is
    not used, because it drops what goes backwards, and a resumed run does.

    Args:
        run_directory: W&B writes its files to `wandb/` under it.
        settings: project, group, tags and so on.
        config: the whole configuration, and what `about` returns.
        run_id: the same each time the run resumes, so that its curves continue.
        log: prints a line: how to upload an offline run. The URL of another one W&B prints itself.
        records: the run's lines so far. Online, those are logged that W&B lacks: a kill loses what
            was on its way, and another view may have failed.
        replaces: whether to log them offline, too; the run's earlier offline files are then set
            aside at the end.
    """

    def __init__(
        self,
        run_directory: Path,
        settings: WandbSettings,
        *,
        config: dict[str, Any],
        run_id: str,
        log: Callable[[str], None],
        records: Iterable[dict[str, Any]] = (),
        replaces: bool = False,
    ) -> None:
        self._log = log
        self._folder = run_directory / "wandb"
        self._row: dict[str, float] = {}
        self._exit_code = 1  # a run that ends before finish() shows as failed
        self._is_open = True
        self._earlier = sorted(self._folder.glob(f"offline-run-*-{run_id}")) if replaces else []
        self._known_step = -1  # the last that W&B has
        try:
            self._run = self._start(run_directory, settings, config=config, run_id=run_id)
            if self._run.offline:
                refuse_uploaded(self._earlier)
            else:  # of a run that it knows, W&B hands back the last value of each series
                self._known_step = self._run.summary.get("trainer/step", -1)
            for record in records if replaces or not self._run.offline else ():
                self.write(as_shown(record))
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
            group=settings.group or unless_set("WANDB_RUN_GROUP", without_seed(run_directory.name)),
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
        axis = f"trainer/{unit_of_settings(config).name}"
        run.define_metric(axis)
        run.define_metric("*", step_metric=axis)
        best = {"val/loss": "min", "val/perplexity": "min", "val/accuracy": "max"}
        for name, extreme in best.items():
            run.define_metric(name, step_metric=axis, summary=extreme)
        return run

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to its step's row, unless W&B has that step: a resumed run repeats some."""
        if record["step"] <= self._known_step:
            return
        if self._row and record["step"] != self._row["trainer/step"]:
            self._log_row()
        self._row |= axes(record) | series(record)

    def sync(self) -> None:
        """Do nothing: W&B says at the next start what it lacks."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Put the summary under final/ and upload; TimeoutError after a minute."""
        self._log_row()
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._exit_code = 0
        self.close()

    def close(self, error: str = "") -> None:
        """Log the last row, alert of an error, end the run and W&B's process; once."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._log_row()
            if error:
                self._run.alert(title="Training has failed", text=error, level="ERROR")
            self._run.finish(exit_code=self._exit_code)
        finally:
            self._end_service()
        for folder in self._earlier:  # else `wandb sync` would upload their rows, too
            folder.rename(folder.with_name(f"replaced-{folder.name}"))
        if self._run.offline:
            self._log(f"W&B: offline; upload with: wandb sync {self._folder}/offline-run-*")

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


def without_seed(run_name: str) -> str:
    """The group of runs that differ in the seed alone."""
    return re.sub(r"[-_]?seed=?\d+", "", run_name)


def about(*, num_ranks: int | None, parameters: int | None) -> dict[str, Any]:
    """What a run is beside its settings, for W&B's configuration of it."""
    return {ABOUT: {"num_ranks": num_ranks, "parameters": parameters}}


def refuse_uploaded(offline_folders: Iterable[Path]) -> None:
    """Raise InputError if one has been uploaded: its rows would be there twice."""
    for folder in offline_folders:
        if any(folder.glob("*.synced")):
            raise InputError(
                f"{folder} has been uploaded by `wandb sync`; upload what is missing online"
            )


def upload_in_process(run_directory: Path, seconds: float) -> None:
    """Upload a run by the command, in a process that a hung W&B here cannot hold.

    Raises:
        TrainingError: why it failed, and the command that a user may repeat.
    """
    environment = python_environment()
    environment.pop("WANDB_SERVICE", None)  # the address of this process's own
    try:
        done = subprocess.run(
            python_command("gns_pretrain", UPLOAD, str(run_directory)),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if not done.returncode:
            return
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = said[-1].removeprefix("error: ")
    except subprocess.TimeoutExpired:
        why = f"no answer in {seconds:.0f} s"
    raise TrainingError(f"{why}; gns-pretrain {UPLOAD} {run_directory} tries again")


@dataclass(frozen=True)
class TrackedRun:
    """A run as W&B has it."""

    name: str  # shown in the web
    config: dict[str, Any]  # the whole configuration, nested
    finished: bool  # it has spent its token budget: not running, failed or killed
    steps: int  # optimizer steps; 0 unless finished
    remote: Any  # the run of wandb's public API

    def validation(self, score: str = "loss") -> list[tuple[int, float]]:
        """Read steps and validation losses (nats), or accuracies, of its complete history."""
        import wandb

        keys = ["trainer/step", f"val/{score}"]
        points: list[tuple[int, float]] = []
        try:
            for row in self.remote.scan_history(keys=keys):
                # What a resumed run repeated replaces what it did before.
                while points and points[-1][0] >= row["trainer/step"]:
                    points.pop()
                points.append((row["trainer/step"], row[f"val/{score}"]))
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
            config = {name: value for name, value in run.config.items() if name != ABOUT}
            runs.append(TrackedRun(run.name, config, finished, int(steps or 0), run))
        return runs
    except (wandb.Error, ValueError, OSError) as error:
        raise _unreadable(f"project {project}", error) from error


def _unreadable(what: str, error: Exception) -> InputError:
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return InputError(
        f"W&B: {what} cannot be read ({reason}); check its name, the network, and `wandb login`"
    )
