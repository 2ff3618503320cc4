"""What makes two runs the same: one table of settings for resuming, sweeps, tables and searches.

Settings are a flat mapping of dotted names, with the fingerprint of the data as one of them: the
same tokens may lie under another `data.path`. What counts depends on the purpose:

                                            resume   record   curve
    run_name, table, cell                   yes      no       no
    seed                                    yes      yes      no
    EXECUTION: where and how a run runs     no       no       no
    SAMPLES: micro-batches, when read       no       (1)      (2)
    batch_size.shadows                      yes      yes      no
    bad_steps.*                             (4)      yes      yes
    evaluation.every_tokens, .every_epochs  no       yes      yes
    other batch_size.* of a constant batch  yes      no       no      policy and initial aside
    noise_scale.*                           yes      (3)      (2)
    optimizer.tied_beta2                    (5)      (5)      (5)
    all others, the data's fingerprint      yes      yes      yes

(1) where something is measured or the batch size is not constant: micro-batches are the samples.
(2) where the batch size is not constant; measuring by itself leaves the training bits unchanged.
(3) where something is measured; noise_scale.geometries, which says so, always.
(4) no: skipping begins with the next bad step, so that a run which one has ended can go on.
(5) with optimizer.tie_to_tokens, which reads it.

Another run may begin where one stands, with whatever settings: `training.initialize`.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PROVENANCE,
    STARTS,
    SUMMARY,
    read_settings,
)
from gns_pretrain.runs.history import read_provenance

FINGERPRINT = "data_fingerprint"  # of run.json, among the settings
NAMES = ("run_name", "table", "cell")
EXECUTION = (
    "launch",
    "parallel",
    "metrics",
    "checkpoint",
    "compile",
    "resume",
    "dry_run",
    "dry_run_steps",
    "output_directory",
    "model.activation_checkpointing",
    "data.path",  # the data itself is compared by its fingerprint, which weights are part of
    "data.sources",
    "data.stage_to",
    "data.verify",
    "scale",  # what a run takes from it stands in its own settings
)
SAMPLES = (
    "micro_batch_size",
    "batch_size.micro_batch_max",
    "batch_size.micro_batch_step",
    "noise_scale.read_after_steps",
)
FREE_ON_RESUME = ("bad_steps", "evaluation.every_tokens", "evaluation.every_epochs")
READ_BY_CONSTANT = ("batch_size.policy", "batch_size.initial")  # of the settings of its group
# What runs were trained with that are older than a setting.
BEFORE_ADDED: dict[str, Any] = {
    "init.from": None,
    "init.what": "weights",
    "data.document_mask": False,
    "bad_steps.skip": False,
    "bad_steps.norm_factor": None,
    "bad_steps.window": 128,
    "bad_steps.max_consecutive": 10,
    "noise_scale.read_after_steps": 0,
    "schedule.decay_fraction": 0.2,
    "schedule.decay_form": "linear",
    "batch_size.growth": 2.0,
    "batch_size.growth_tokens": None,
    "batch_size.price": 0.1,
    "schedule.final_lr": None,
    "epochs": None,
    "sample_budget": None,
    "noise_scale.every_epochs": None,
    "evaluation.every_epochs": 1.0,
    "evaluation.num_images": None,
    "averaging.kind": "none",
    "averaging.decay": None,
    "averaging.interpolation": 0.0,
    "averaging.start": 0.0,
    "averaging.count_first": False,
    "model.parametrization": "standard",
    "model.mup_base_dim": 64,
    "noise_scale.composite_rest": "manhattan",
    "noise_scale.composite_sum": "roots",
    "noise_scale.of_momentum": False,
    "optimizer.weight_decay_timescale": None,
    "optimizer.tied_beta2": [0.0, 1.0],
}
SHOWN = 3  # settings, of all that differ, in an error


class Purpose(Enum):
    """What two runs are compared for."""

    RESUME = "to resume one as the other"
    RECORD = "to let the record of one, measurements included, stand for the other's"
    CURVE = "to average their loss curves over seeds, or to compare them at different settings"


def deciding_settings(settings: Mapping[str, Any], purpose: Purpose) -> dict[str, Any]:
    """The settings that must be equal in two runs that are the same for this purpose."""
    return {name: value for name, value in settings.items() if decides(name, settings, purpose)}


def decides(name: str, settings: Mapping[str, Any], purpose: Purpose) -> bool:
    """Whether the setting `name` counts, in a run with these settings; see the table above."""
    constant = settings.get("batch_size.policy", "constant") == "constant"
    measured = bool(settings.get("noise_scale.geometries"))
    if _is_one_of(name, EXECUTION):
        return False
    if name == "optimizer.tied_beta2" and not settings.get("optimizer.tie_to_tokens"):
        return False
    if purpose is Purpose.RESUME:
        return name not in SAMPLES and not _is_one_of(name, FREE_ON_RESUME)
    if name in NAMES:
        return False
    if name == "seed" or name == "batch_size.shadows":
        return purpose is Purpose.RECORD
    if name in SAMPLES:
        return not constant or (measured and purpose is Purpose.RECORD)
    if name.startswith("batch_size."):
        return not constant or name in READ_BY_CONSTANT
    if name.startswith("noise_scale."):
        if purpose is Purpose.CURVE:
            return not constant
        return measured or name == "noise_scale.geometries"
    return True


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, in order; a setting that is missing counts as None."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def varying_settings(runs: Sequence[Mapping[str, Any]], purpose: Purpose) -> list[str]:
    """Names of the settings that differ between runs and count in one of them, sorted."""
    return [
        name
        for name in sorted({name for settings in runs for name in settings})
        if any(settings.get(name) != runs[0].get(name) for settings in runs)
        and any(decides(name, settings, purpose) for settings in runs)
    ]


def changes_run_name(name: str, *, policy: str) -> bool:
    """Whether a run_name holds an override of this setting or group.

    It holds what must be equal to resume, the data by its folder's name, and with a batch that
    changes the micro-batch, by which two adaptive runs differ.

    Args:
        name: as typed: `optimizer.lr`, or `optimizer` for a group.
        policy: the run's batch-size policy.
    """
    if name in ("data.path", "data.sources"):
        return True
    if name in SAMPLES:
        return policy != "constant"
    return not _is_one_of(name, (*EXECUTION, *FREE_ON_RESUME))


def identifying_settings(settings: Mapping[str, Any], data_fingerprint: str) -> dict[str, Any]:
    """Nested settings as a flat mapping, and the data's fingerprint among them."""
    return BEFORE_ADDED | flatten(settings) | {FINGERPRINT: data_fingerprint}


def settings_of_run(directory: Path) -> dict[str, Any]:
    """The settings of a run directory, flat, with its data's fingerprint if it has one."""
    known = (directory / PROVENANCE).is_file()
    data = {FINGERPRINT: read_provenance(directory)[FINGERPRINT]} if known else {}
    settings = flatten(read_settings(directory))
    return (BEFORE_ADDED | settings if settings else {}) | data


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def refuse_another_run(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if a directory holds a run with other settings or data, or part of one."""
    written_later = (STARTS, METRICS, SUMMARY, CHECKPOINTS)
    present = [name for name in written_later if (directory / name).exists()]
    for name in (CONFIG, PROVENANCE) if present else ():
        if not (directory / name).exists():
            raise InputError(
                f"{directory / name} is missing, so the run whose {present[0]} is there may be "
                "another one; restore it, or use another run_name"
            )
    if not (directory / CONFIG).exists():
        return
    known = settings_of_run(directory)
    hint = (
        "use another run_name, which init.from and init.what=all let go on from this one, or "
        "resume=never to restart in a fresh directory"
    )
    changed = [
        f"{name} was {known.get(name)} and is now {settings.get(name)}"
        for name in differing_settings(known, settings)
        if name != FINGERPRINT and decides(name, settings, Purpose.RESUME)
    ]
    if changed:
        shown = "; ".join(changed[:SHOWN]) + ("; ..." if len(changed) > SHOWN else "")
        raise InputError(f"{directory} holds a run with other settings: {shown}; {hint}")
    then, now = known.get(FINGERPRINT), settings[FINGERPRINT]
    if then not in (None, now):
        raise InputError(
            f"{directory} holds a run on other data: data.path={settings.get('data.path')} has "
            f"fingerprint {now[:12]}, the run's had {str(then)[:12]}; {hint}"
        )


def _is_one_of(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == listed or name.startswith(listed + ".") for listed in settings)
