"""What is typed for a setting that is text stays as it was typed.

Hydra reads run_name=1e5 as the number 100000.0, run_name=1_000 as 1000 and run_name=null as none,
before it knows that the setting is text, and knows no value that begins with a ~.
"""

import re
import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from gns_pretrain.config.schema import Config
from gns_pretrain.fields import at_home
from gns_pretrain.optim import OPTIMIZERS

CONFIG_DIR = "--config-dir="
# Values without signs of Hydra's own, save commas, which separate those of a sweep, and ${..}.
PLAIN = r"(?:[^'\"()\[\]{}\\$]|\$\{[^'\"()\[\]{}\\]*\})*"
ASSIGNMENT = re.compile(rf"(\+{{0,2}}([\w.]+)=)(\[?)({PLAIN})(\]?)")
NOT_TEXT = re.compile(
    r"~.*|null|true|false|[+-]?(?:inf|nan|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d[\d_]*)?)",
    re.IGNORECASE,
)


def as_typed(word: str) -> str:
    """Quote the values in a word of a command line that Hydra would not leave as text."""
    if word.startswith(CONFIG_DIR):
        return CONFIG_DIR + at_home(word.removeprefix(CONFIG_DIR))
    if not (assignment := ASSIGNMENT.fullmatch(word)):
        return word
    before, name, opened, values, closed = assignment.groups()
    kinds = text_settings().get(name, set())
    if (list[str] if opened else str) not in kinds:
        return word
    stays = {"null"} if type(None) in kinds else set()
    quoted = [
        f'"{value}"' if NOT_TEXT.fullmatch(value) and value not in stays else value
        for value in values.split(",")
    ]
    return f"{before}{opened}{','.join(quoted)}{closed}"


@cache
def text_settings() -> dict[str, set[Any]]:
    """The settings of a run that are text or lists of it, and of which types they may be."""
    found = _text_settings(Config)
    for schema in OPTIMIZERS.values():
        found |= _text_settings(schema, "optimizer.")
    return found | {"init.from": {str, type(None)}}  # a mapping's, since `from` is no field's name


def _text_settings(schema: type, prefix: str = "") -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if isinstance(hint, type) and is_dataclass(hint):
            found |= _text_settings(hint, f"{prefix}{field.name}.")
        elif str in kinds or list[str] in kinds:
            found[prefix + field.name] = kinds
    return found
