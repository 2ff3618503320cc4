"""From what Hydra composed to plain settings."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gns_pretrain.config.naming import name_of_overrides
from gns_pretrain.config.register import SCHEMA, choices_of
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError
from gns_pretrain.runs.identity import flatten


def settings_from(node: DictConfig, overrides: Iterable[str]) -> Config:
    """Convert what Hydra composed to plain dataclasses, which check themselves as they are made.

    Args:
        node: the composed configuration, without Hydra's own.
        overrides: the command's, for run_name.

    Raises:
        InputError: a setting breaks a rule or is still missing.
    """
    overrides = list(overrides)
    refuse_schemas(overrides)
    # Unresolved: what a setting is taken from can then be named.
    values = flatten(cast(dict[str, Any], OmegaConf.to_container(node)))
    missing = {key for key, value in values.items() if value == "???"}
    for key, value in values.items():
        source = re.fullmatch(r"\$\{(scale\.[\w.]+)\}", str(value))
        if source and source[1] in missing:
            raise InputError(
                missing_of_scale(source[1], values["scale.name"], values["scale.workload"])
            )
        if key in missing and not key.startswith("scale."):
            raise InputError(f"{key} has no value; give it one, as in: {key}=...")
    for key in missing:  # of the scale: no role of this run reads it
        OmegaConf.update(node, key, None)
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    refuse_additions(config)
    template = values["run_name"]
    more = name_of_overrides(node, overrides, template=template, settings=values.keys())
    return dataclasses.replace(config, run_name=config.run_name + more)  # checked as it is


def refuse_schemas(overrides: Iterable[str]) -> None:
    """Refuse the schema of a group as its choice: YAML files begin from it, and nothing else."""
    for word in overrides:
        group, _, choice = word.lstrip("+").partition("=")
        if choice.startswith(SCHEMA):
            known = ", ".join(choices_of(group))
            raise InputError(f"{word}: there is no such choice; use one of {known}")


def missing_of_scale(number: str, scale: str, workload: str) -> str:
    """Describe a number that an experiment needs and its scale does not have."""
    optimizer = re.fullmatch(r"scale\.(\w+)\.\w+", number)
    if scale == "none":
        hint = "choose a scale that has it, as in: scale=demo"
    elif optimizer:
        search = "tune" if workload == "language" else f"tune_{workload}"
        hint = (
            f"+sweep={search}_{optimizer[1]} scale={scale} searches for it and "
            f"gns-pretrain best-of-search reports what it found; then give {number}=..., or write "
            f"it into conf/scale/{scale}/{workload}.yaml"
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
