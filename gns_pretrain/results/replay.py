"""What a batch-size policy chooses on a recorded run's noise scale, beside what the run did.

python -m gns_pretrain.results.replay FILE [--theta 0.6] ...

FILE is a published curve, a W&B export or a run's metrics.jsonl (`reading.py`). The settings are
those of the published signSGD runs (arXiv:2602.03001, Figure 3), or of the config.yaml beside a
metrics.jsonl, unless an option says otherwise. The replay counts its own sequences, step by step,
from nothing but the noise scale. Exit code: 0 the same path, 1 another one, 2 bad input.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from gns_pretrain.batch_size.controller import Controller, SavedAverages, make_controller
from gns_pretrain.batch_size.policies import Position
from gns_pretrain.batch_size.settings import BatchSizeSettings
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.smoothing import SmoothingSettings
from gns_pretrain.results.reading import History, read_history
from gns_pretrain.results.replay_report import (
    Replayed,
    as_json,
    first_difference,
    side_by_side,
    verdict,
)
from gns_pretrain.results.replay_settings import (
    ReplaySettings,
    add_options,
    policy_settings,
    run_config,
    settings_for,
)
from gns_pretrain.schedule import Schedule, steps_in_budget

AS_RECORDED = SmoothingSettings(noise_decay=0.0, signal_decay=0.0)


def replay(history: History, settings: ReplaySettings) -> list[Replayed]:
    """Every recorded step, with what the policy does there, until it has spent the budget."""
    initial, length = settings.batch_size.initial, settings.sequence_length
    total_steps = steps_in_budget(settings.token_budget, batch_size=initial, sequence_length=length)
    controller = make_replayed(history, settings, total_steps)
    schedule = Schedule(settings.schedule, initial, total_steps)
    rows = {row.step: row for row in history.rows}
    averages: SavedAverages = {}
    batch_size, multiplier, samples, target = initial, 1.0, 0, None
    path = []
    for step in range(1, history.rows[-1].step + 1):
        if samples * length >= settings.token_budget:
            break
        position = Position.after(
            step - 1,
            samples=samples,
            tokens=samples * length,
            token_budget=settings.token_budget,
            sequence_length=length,
        )
        target = first_not_none(controller.wanted(position, averages), target)
        if decision := controller.decide(position, batch_size, averages):
            batch_size, multiplier = decision.split.batch_size, decision.lr_multiplier
        peak = settings.peak_lr
        lr = None if peak is None else peak * (schedule.factor(samples) * multiplier)
        samples += batch_size
        if step in rows:
            path.append(Replayed(rows[step], batch_size, samples * length, lr, target))
        if step in history.measurements:
            controller.include(averages, history.measurements[step])
    last = path[-1].row.step if path else 0
    over = [row for row in history.rows if row.step > last]
    return path + [Replayed(row, None, None, None, None) for row in over]


def make_replayed(history: History, settings: ReplaySettings, total_steps: int) -> Controller:
    """The controller to replay; averages that were recorded are taken as they are."""
    policy = settings.batch_size
    return make_controller(
        policy,
        "replay",
        sizes=settings.sizes,
        initial_batch_size=policy.initial,
        total_steps=total_steps,
        smoothing=AS_RECORDED if history.averaged else settings.smoothing,
    )


def first_not_none(value: float | None, otherwise: float | None) -> float | None:
    """`value`, unless there is none."""
    return otherwise if value is None else value


def asked_of_record(policy: BatchSizeSettings) -> dict[str, Any]:
    """Which measurements to read: recorded averages serve a policy without decays of its own."""
    raw = policy.policy == "norm_test" or (policy.noise_decay, policy.signal_decay) != (None, None)
    return {"reads": policy.reads, "raw": raw}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gns_pretrain.results.replay",
        description="Replay a batch-size policy on a recorded run, side by side with the run.",
        epilog="Exit code: 0 the same path, 1 another one (the first row is named), 2 bad input.",
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    try:
        config = run_config(given.file)
        # The record tells the first size, and 1 lets any plan pass until it has been read.
        asked = asked_of_record(policy_settings(given, config, initial=1))
        history = read_history(given.file, **asked, run=given.run)
        settings = settings_for(given, config, history)
        path = replay(history, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(as_json(path)))
    else:
        for line in [*history.notes, str(settings), *side_by_side(path, every_row=given.every_row)]:
            print(line)
        print(verdict(path))
    return 0 if first_difference(path) is None else 1


if __name__ == "__main__":
    sys.exit(main())
