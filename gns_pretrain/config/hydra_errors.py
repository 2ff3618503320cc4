"""Hydra's composition errors as one line that names the setting, the rule and the way out."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError

WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "conf"
SEVERAL_VALUES = "Ambiguous value for argument"


def as_input_error(error: Exception, overrides: Sequence[str] = ()) -> InputError:
    """The same mistake, told to people; an error of another kind is raised again as it is.

    Args:
        error: what Hydra raised.
        overrides: the command's words.
    """
    if isinstance(error, ConfigCompositionException) and str(error).startswith(SEVERAL_VALUES):
        return mistake_in_list_of_values(error, overrides)
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override}: not of the form setting=value; quote a value that has special "
            "signs, as in: 'run_name=\"a b\"'"
        )
    if isinstance(error, MissingConfigException):
        return InputError(missing_choice(error))
    if isinstance(error, ConfigCompositionException):
        return InputError(bad_override(error))
    if isinstance(error, OmegaConfBaseException):
        return InputError(f"{error.full_key}: {first_line(error)}; see the files under conf/")
    raise error


def mistake_in_list_of_values(error: Exception, overrides: Sequence[str]) -> InputError:
    """What is wrong with a command that gives a setting several values.

    Hydra composes a command to see whether it is a sweep, and takes it for a single run when that
    fails, whatever the reason. With one value for each list the reason shows.
    """
    words = [
        f"{word.get_key_element()}={next(word.sweep_string_iterator())}"
        if word.is_sweep_override()
        else str(word.input_line)
        for word in OverridesParser.create().parse_overrides(list(overrides))
    ]
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            compose("train", words)
    except Exception as reason:
        return as_input_error(reason)
    given = re.search(r"'(.+)'", first_line(error))
    return InputError(
        f"{given[1] if given else ''}: several values make a sweep; add --multirun to train with "
        "each of them"
    )


def missing_choice(error: MissingConfigException) -> str:
    """A group's option that has no file."""
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or [] if not name.startswith("schema_")]
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return "Optuna's sweeper is not installed; pip install 'gns-pretrain[tune]'"
    if not group or not options:
        return f"{error.missing_cfg_file}: there is no such file under conf/"
    return f"{group}={choice}: there is no such choice; use one of {', '.join(options)}"


def bad_override(error: ConfigCompositionException) -> str:
    """A setting that does not exist, or a value of the wrong type."""
    cause = error.__cause__
    text = first_line(error)
    given = re.search(r"'([^'=]+)(?:=[^']*)?'|merging override ([^\s=]+)", text)
    key = str(getattr(cause, "full_key", None) or (given and (given[1] or given[2])) or "")
    if text.startswith("Could not override"):
        return unknown_setting(key.lstrip("+~"))
    if text.startswith("Error merging override") and isinstance(cause, OmegaConfBaseException):
        assignment = text.removeprefix("Error merging override ")
        return f"{assignment}: {expectation(first_line(cause))}"
    return f"{text}; see the files under conf/"


def expectation(reason: str) -> str:
    """What a value should have been."""
    wrong_type = re.search(r"of type '(\w+)' could not be converted to (\w+)", reason)
    if not wrong_type:
        return f"{reason}; give a value of the setting's own kind"
    wanted = WANTED.get(wrong_type[2], wrong_type[2])
    hint = ", written without a point or exponent" if wrong_type[2] == "Integer" else ""
    return f"this setting is {wanted}{hint}; give it one"


def unknown_setting(name: str) -> str:
    """A setting that nobody reads, and the one that was probably meant."""
    known = known_settings(Config)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    guess = f"did you mean {close[0]}?" if close else "conf/ holds every setting there is"
    return f"{name}: there is no such setting; {guess}"


def known_settings(schema: Any, prefix: str = "") -> list[str]:
    """Dotted names of a dataclass's fields and those of its own dataclass fields, groups too.

    Where a field has a choice of schemas (optimizers), the names of all are known.
    """
    names = []
    for field in dataclasses.fields(schema):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            for choice in (field.type, *field.type.__subclasses__()):
                names += known_settings(choice, f"{prefix}{field.name}.")
    return list(dict.fromkeys(names))


def first_line(error: Exception) -> str:
    """The message without Hydra's own hints."""
    return str(error).partition("\n")[0].strip()
