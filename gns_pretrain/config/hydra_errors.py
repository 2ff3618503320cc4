"""Hydra's composition errors as one line that names the setting, the rule and a hint."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from traceback import walk_tb
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gns_pretrain.config.naming import is_token_count, shortest_end
from gns_pretrain.config.register import CONFIG_FOLDER, choices_of
from gns_pretrain.errors import InputError, one_line
from gns_pretrain.optim import OPTIMIZERS
from gns_pretrain.runs.identity import flatten

WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
SEVERAL_VALUES = "Ambiguous value for argument"
LENGTH = (
    "a run's length is token_budget, in tokens: steps x batch_size.initial x data.sequence_length"
)
# What other trainers call a setting of ours, or what has no counterpart.
OTHER_NAMES = {
    **dict.fromkeys(("steps", "max_steps", "num_steps", "max_iters"), LENGTH),
    "wandb": "metrics=wandb shows a run there",
    "max_tokens": "did you mean token_budget?",
    "bs": "did you mean batch_size.initial?",
    **dict.fromkeys(("nproc_per_node", "devices"), "did you mean launch.nproc_per_node?"),
    **dict.fromkeys(
        ("seq_len", "max_seq_len", "max_seq_length"), "did you mean data.sequence_length?"
    ),
    **dict.fromkeys(("local_batch_size", "device_batch_size"), "did you mean micro_batch_size?"),
    "global_batch_size": "did you mean batch_size.initial?",
}
# Of a group that is given a number or a path, what was probably meant.
OF_GROUP = {
    "batch_size": "batch_size.initial=N is the number of sequences in a step",
    "data": "data=shards data.path=FOLDER trains on what gns-pretrain prepare-data wrote",
}


def as_input_error(error: Exception, overrides: Sequence[str] = ()) -> InputError:
    """Convert an error of composition to one line; raise any other error as it is."""
    if isinstance(error, ConfigCompositionException) and str(error).startswith(SEVERAL_VALUES):
        return mistake_in_list_of_values(error, overrides)
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override}: not of the form setting=value; quote a value that has special "
            "signs, as in: 'run_name=\"a b\"'"
        )
    if isinstance(error, SearchPathException):
        return InputError(f"--config-dir: {one_line(error)}; name a folder of YAML files")
    if isinstance(error, MissingConfigException):
        return InputError(missing_choice(error))
    if isinstance(error, ConfigCompositionException):
        return InputError(bad_override(error))
    if isinstance(error, OmegaConfBaseException):
        return InputError(
            f"{error.full_key}: {first_line(error)}; see the files under {CONFIG_FOLDER}"
        )
    if isinstance(error, YAMLError):
        return InputError(f"{one_line(error)}; correct the file")
    if raised_by_hydra(error):
        return InputError(mistake_in_choice(error, overrides))
    raise error


def raised_by_hydra(error: Exception) -> bool:
    """Whether an error, of any class, comes from the inside of Hydra or OmegaConf."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def mistake_in_choice(error: Exception, overrides: Sequence[str]) -> str:
    """Describe a group that was given a number or a list, on which Hydra fails without a name."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        options = choices_of(str(override.key_or_group))
        if options and not isinstance(override.value(), str):
            group = override.key_or_group
            hint = OF_GROUP.get(str(group), f"set what is in it by {group}.NAME=...")
            return (
                f"{override.input_line}: {group} is a group of settings; choose one of "
                f"{', '.join(options)}; {hint}"
            )
    return (
        f"{' '.join(overrides)}: Hydra cannot compose these settings ({one_line(error)}); see "
        "--help for how they are written"
    )


def mistake_in_list_of_values(error: Exception, overrides: Sequence[str]) -> InputError:
    """Find what is wrong with a command that gives a setting several values.

    Hydra composes a command to see whether it is a sweep, and takes it for a single run when that
    fails, whatever the reason. With the first value of each list, composing shows the reason.
    """
    single = [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            compose("train", single)
    except Exception as reason:
        return as_input_error(reason)
    given = re.search(r"'(.+)'", first_line(error))
    return InputError(
        f"{given[1] if given else ''}: several values make a sweep; add --multirun to train with "
        "each of them"
    )


def missing_choice(error: MissingConfigException) -> str:
    """Describe a choice that has no file: which ones there are."""
    missing = error.missing_cfg_file or ""
    group, _, choice = missing.rpartition("/")
    if missing.startswith("data/"):  # data=/a/path
        group, choice = "data", missing.removeprefix("data/")
    # Hydra looks for other cells of experiment=table2/x in `experiment`.
    options = error.options or choices_of(group)
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return "Optuna's sweeper is not installed; pip install 'gns-pretrain[tune]'"
    if not group or not options:
        return f"{error.missing_cfg_file}: there is no such file under {CONFIG_FOLDER}"
    if group.startswith("scale/"):  # scale=h200 workload=imagewoof
        return (
            f"{group.replace('/', '=')} has no numbers for workload={choice}, only for "
            f"{', '.join(options)}; use another scale"
        )
    hint = f"; {OF_GROUP[group]}" if group in OF_GROUP else ""
    return f"{group}={choice}: there is no such choice; use one of {', '.join(options)}{hint}"


def bad_override(error: ConfigCompositionException) -> str:
    """Describe a setting that does not exist, or a value of the wrong type."""
    cause = error.__cause__
    text = first_line(error)
    if text.startswith("Could not override") and isinstance(cause, OmegaConfBaseException):
        name = text.split("'")[1]  # the whole of it: cause has only the part that does not exist
        return f"{name}: there is no such setting; {setting_hint(name, composed_settings(cause))}"
    if text.startswith("Error merging override") and isinstance(cause, OmegaConfBaseException):
        assignment = text.removeprefix("Error merging override ")
        if assignment.startswith("data.sources="):
            return f"{assignment}: each source is {{path: data/c4, weight: 0.7}}; list them in []"
        reason = first_line(cause)
        wrong_type = re.search(r"of type '\w+' could not be converted to (\w+)", reason)
        if not wrong_type:
            return f"{assignment}: {reason}; give a value of the setting's own kind"
        wanted = WANTED.get(wrong_type[1], wrong_type[1])
        hint = ", written without a point or exponent" if wrong_type[1] == "Integer" else ""
        if hint and is_token_count(assignment.partition("=")[0]):
            hint = " of tokens, such as 1_000_000, 1e6, 1M or 3.2B"
        return f"{assignment}: this setting is {wanted}{hint}; give it one"
    return f"{text}; see the files under {CONFIG_FOLDER}"


def composed_settings(error: OmegaConfBaseException) -> list[str]:
    """List the groups and the dotted settings of the configuration that an override missed."""
    assert error.parent_node is not None
    root = OmegaConf.to_container(cast(DictConfig, error.parent_node._get_root()))
    return [*cast(dict[str, Any], root), *flatten(cast(dict[str, Any], root))]


def setting_hint(name: str, known: Sequence[str]) -> str:
    """Suggest what may have been meant by a setting that the composed ones lack."""
    group, _, key = name.partition(".")
    having = [n for n, schema in OPTIMIZERS.items() if key in (f.name for f in fields(schema))]
    if group == "optimizer" and having:
        return f"optimizer={' or '.join(having)} has it"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if key and group not in known:  # training.steps of another trainer
        return setting_hint(name.rpartition(".")[2], known)
    of_a_run = [n for n in known if not n.startswith("scale.")]
    close = [n for n in of_a_run if shortest_end(n, of_a_run) == name]
    close = close or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "--cfg job lists those of a command"


def first_line(error: Exception) -> str:
    """Return the message without Hydra's own hints."""
    return str(error).partition("\n")[0].strip()
