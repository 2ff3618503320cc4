"""From what Hydra composed to plain settings."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gns_pretrain.config.naming import name_of_overrides
from gns_pretrain.config.register import SCHEMA, choices_of
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.power_lines import batch_size_by_rule
from gns_pretrain.runs.directory import read_settings
from gns_pretrain.runs.identity import BEFORE_ADDED, flatten

INITIAL = "batch_size.initial"
RULE_OF_SCALE = "${auto:}"  # what `auto` is in a YAML file: the setting itself is a number


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
    if values[INITIAL] == RULE_OF_SCALE:
        OmegaConf.update(node, INITIAL, initial_batch_size(node))
    for key in missing:  # of the scale: no role of this run reads it
        OmegaConf.update(node, key, None)
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    refuse_additions(config)
    template = values["run_name"]
    more = name_of_overrides(node, overrides, template=template, settings=values.keys())
    return as_begun(dataclasses.replace(config, run_name=config.run_name + more))


def initial_batch_size(node: DictConfig) -> int:
    """Sequences of the first step by the rule of scale; InputError where it says nothing."""
    length = OmegaConf.select(node, "data.sequence_length")
    if node.token_budget is None or length is None:
        raise InputError(
            f"{INITIAL}=auto is a law of text, in tokens, and this run is on images; give a number"
        )
    return batch_size_by_rule(node.token_budget, length)


def as_begun(config: Config) -> Config:
    """Give a run that began before `optimizer.tied_beta2` what it was trained with.

    So the command that began it resumes it, step by step as it would have gone on.
    """
    name, default = "optimizer.tied_beta2", OptimizerSettings().tied_beta2
    given = config.optimizer.tied_beta2 != default
    if given or not config.optimizer.tie_to_tokens or config.resume == "never":
        return config
    begun = flatten(read_settings(Path(config.output_directory) / config.run_name))
    if not begun or name in begun:
        return config
    optimizer = dataclasses.replace(config.optimizer, tied_beta2=BEFORE_ADDED[name])
    return dataclasses.replace(config, optimizer=optimizer)


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
