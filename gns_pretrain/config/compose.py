"""From what Hydra composed to plain settings."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError
from gns_pretrain.runs.identity import changes_run_name, flatten


def settings_from(node: DictConfig, overrides: Iterable[str]) -> Config:
    """Convert what Hydra composed to plain dataclasses, which check themselves as they are made.

    Args:
        node: the composed configuration, without Hydra's own.
        overrides: the command's, for the run_name of a table's cell.

    Raises:
        InputError: a setting breaks a rule or is still missing.
    """
    # Unresolved: what a setting is taken from can then be named.
    values = flatten(cast(dict[str, Any], OmegaConf.to_container(node)))
    missing = {key for key, value in values.items() if value == "???"}
    for key, value in values.items():
        source = re.fullmatch(r"\$\{(scale\.[\w.]+)\}", str(value))
        if source and source[1] in missing:
            raise InputError(missing_of_scale(source[1], values["scale.name"]))
        if key in missing and not key.startswith("scale."):
            raise InputError(f"{key} has no value; give it one, as in: {key}=...")
    for key in missing:  # of the scale: no role of this run reads it
        OmegaConf.update(node, key, None)
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    refuse_additions(config)
    if config.table is not None:
        more = name_of_overrides(overrides, policy=config.batch_size.policy)
        config = dataclasses.replace(config, run_name=config.run_name + more)  # checked as it is
    return config


def name_of_overrides(overrides: Iterable[str], *, policy: str) -> str:
    """Return the end of a cell's run_name: the settings overridden, as in `-optimizer.lr=0.001`.

    The experiment, the scale and the seed stand in the name already; what changes only how and
    where a run computes stays out of it. A run_name that is given stays as it is.
    """
    words = [word.lstrip("+") for word in overrides]
    keys = [word.partition("=")[0] for word in words]
    if "run_name" in keys:
        return ""
    named = ("experiment", "sweep", "scale", "seed")
    own = sorted(
        word
        for key, word in zip(keys, words, strict=True)
        if key not in named and (key.startswith("scale.") or changes_run_name(key, policy=policy))
    )
    return "".join("-" + re.sub(r"[^A-Za-z0-9._=,+-]", "", word) for word in own)


def missing_of_scale(number: str, scale: str) -> str:
    """Describe a number that an experiment needs and its scale does not have."""
    optimizer = re.fullmatch(r"scale\.(\w+)\.\w+", number)
    if scale == "none":
        hint = "choose a scale that has it, as in: scale=demo"
    elif optimizer:
        hint = (
            f"+sweep=tune_{optimizer[1]} scale={scale} searches for it and "
            f"gns-pretrain best-of-search reports what it found; then give {number}=..., or write "
            f"it into conf/scale/{scale}.yaml"
        )
    else:
        hint = f"give it one, as in: {number}=..."
    return f"{number} has no value at scale={scale}; {hint}"


def refuse_additions(settings: Any, prefix: str = "") -> None:
    """Refuse what `+name=value` added to a schema's own fields: nothing would read it."""
    known = {field.name for field in dataclasses.fields(settings)}
    for name, value in vars(settings).items():
        if name not in known:
            raise InputError(f"{prefix}{name}: there is no such setting; leave it out")
        if dataclasses.is_dataclass(value):
            refuse_additions(value, f"{prefix}{name}.")


def as_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
