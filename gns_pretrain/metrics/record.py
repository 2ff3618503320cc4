"""Everything a run tells, in one place: the loop calls Record and formats, times and asks nothing.

metrics.jsonl comes first and is the record; the console, W&B and TensorBoard are views of it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from gns_pretrain.metrics.console import ConsoleView
from gns_pretrain.metrics.jsonl import JsonLines, read_records, truncate_after_step
from gns_pretrain.metrics.settings import MetricsSettings
from gns_pretrain.metrics.summary import summarize, write_summary
from gns_pretrain.metrics.tensorboard import TensorboardView
from gns_pretrain.metrics.view import MayFail, View
from gns_pretrain.metrics.wandb import WandbView


class Record:
    """The record of a run and its views. Only the main process writes; elsewhere all is a no-op.

    Args:
        run_directory: Holds metrics.jsonl, summary.json and what the views write.
        settings: Which views, and how often.
        is_main: Whether this process is the one that writes.
        resume_step: Step of the checkpoint the run goes on from; 0 starts a run. Lines of later
            steps are cut from metrics.jsonl: they will be written again.
        config: The whole configuration, for W&B.
        token_budget: Tokens at which the run ends.
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
        token_budget: int,
        run_id: str,
    ) -> None:
        self._run_directory = run_directory
        self._path = run_directory / "metrics.jsonl"
        self._lines: JsonLines | None = None
        self._console: ConsoleView | None = None
        self._views: list[View] = []
        if not is_main:
            return
        run_directory.mkdir(parents=True, exist_ok=True)
        # Without a checkpoint even a validation before the first step comes again.
        truncate_after_step(self._path, resume_step if resume_step > 0 else -1)
        self._lines = JsonLines(self._path)
        self._console = ConsoleView(
            settings, token_budget=token_budget, run_directory=run_directory
        )
        self._views = [self._console]
        if settings.wandb.enabled:
            wandb = partial(WandbView, run_directory, settings.wandb, config=config, run_id=run_id)
            self._views.append(MayFail("W&B", wandb, self.message))
        if settings.tensorboard:
            tensorboard = partial(TensorboardView, run_directory, resume_step=resume_step)
            self._views.append(MayFail("TensorBoard", tensorboard, self.message))

    def train(
        self,
        *,
        step: int,
        samples: int,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float,
        batch_size: int,
        micro_batch_size: int,
        accumulation: int,
        step_seconds: float,
        tokens_per_second: float,
    ) -> None:
        """One optimizer step.

        Args:
            step: Its number, from 1.
            samples: Sequences consumed so far.
            tokens: Tokens consumed so far.
            loss: Mean negative log-likelihood per token of the step's batch, nats.
            lr: Learning rate of the step.
            grad_norm: Euclidean norm of the whole gradient, before clipping.
            batch_size: Sequences of the step over all ranks.
            micro_batch_size: Sequences of one micro-batch on one rank.
            accumulation: Micro-batches of the step on each rank.
            step_seconds: Wall time of the step.
            tokens_per_second: Tokens of the step over all ranks, by step_seconds.
        """
        self._tell(
            {
                "kind": "train",
                "step": step,
                "samples": samples,
                "tokens": tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "accumulation": accumulation,
                "step_seconds": step_seconds,
                "tokens_per_second": tokens_per_second,
            }
        )

    def validation(self, *, step: int, tokens: int, loss: float) -> None:
        """An evaluation after `step` steps and `tokens` tokens; loss in nats per token."""
        self._tell({"kind": "validation", "step": step, "tokens": tokens, "loss": loss})

    def noise(
        self,
        *,
        step: int,
        geometry: str,
        estimate: str,
        noise: float,
        signal: float,
        noise_scale: float | None,
        noise_ema: float,
        signal_ema: float,
        noise_scale_ema: float | None,
        num_samples: int,
        seconds: float,
        **more: Any,
    ) -> None:
        """One measurement of the noise scale in one geometry, by one estimate.

        Args:
            step: The step whose gradients were measured.
            geometry: Its name.
            estimate: Its name.
            noise: Measured noise of one sequence's gradient, in the geometry's unit.
            signal: Measured signal, same unit.
            noise_scale: Their quotient, sequences; None where there is no signal.
            noise_ema: Smoothed noise.
            signal_ema: Smoothed signal.
            noise_scale_ema: The smoothed ones' quotient, sequences.
            num_samples: Micro-batches over all ranks.
            seconds: Extra wall time of the measurement.
            more: Further numbers, placed after these.
        """
        record = {
            "kind": "noise",
            "step": step,
            "geometry": geometry,
            "estimate": estimate,
            "noise": noise,
            "signal": signal,
            "noise_scale": noise_scale,
            "noise_ema": noise_ema,
            "signal_ema": signal_ema,
            "noise_scale_ema": noise_scale_ema,
            "num_samples": num_samples,
            "seconds": seconds,
        }
        self._tell(record | more)

    def batch_size_changed(
        self,
        *,
        step: int,
        previous: int,
        new: int,
        target: float | None,
        lr_multiplier: float,
        why: str = "",
    ) -> None:
        """A decision of the batch-size policy, in sequences.

        Args:
            step: The first step of the new size.
            previous: Batch size before.
            new: Batch size from here on.
            target: What the policy asked for before rounding; None where the ranks alone made
                another size necessary.
            lr_multiplier: Factor on the scheduled learning rate from here on.
            why: How the target became the new size, for the console.
        """
        record = {
            "kind": "batch_size",
            "step": step,
            "from": previous,
            "to": new,
            "target": target,
            "lr_multiplier": lr_multiplier,
        }
        self._tell(record, why=why)

    def shadow_batch_size_changed(
        self,
        *,
        policy: str,
        step: int,
        previous: int,
        new: int,
        target: float,
        lr_multiplier: float,
    ) -> None:
        """What a policy that is not followed would have decided; likewise."""
        self._tell(
            {
                "kind": "shadow",
                "step": step,
                "policy": policy,
                "from": previous,
                "to": new,
                "target": target,
                "lr_multiplier": lr_multiplier,
            }
        )

    def message(self, text: str) -> None:
        """Print one line that leaves the progress bar whole."""
        if self._console is not None:
            self._console.message(text)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, send it to the views and print the closing table.

        Args:
            summary: Fields added to what the record says (summary.summarize), or put in place
                of it.
        """
        if self._lines is None:
            return
        full = {"state": "finished", **summarize(read_records(self._path)), **summary}
        write_summary(self._run_directory / "summary.json", full)
        # The console was opened first and comes last: the run ends with its closing table.
        for view in reversed(self._views):
            view.finish(full)

    def close(self) -> None:
        """End all writing, also after a failure; a second call does nothing."""
        for view in reversed(self._views):
            view.close()
        self._views = []
        if self._lines is not None:
            self._lines.close()

    def _tell(self, record: dict[str, Any], **shown: Any) -> None:
        """Write one line, then show it; `shown` is for the views alone."""
        if self._lines is None:
            return
        # JSON has no infinity: a noise scale without signal becomes null.
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._lines.write(line)
        for view in self._views:
            view.write(line | shown)
