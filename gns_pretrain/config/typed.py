"""What is typed for a setting that is text stays as it was typed; 1M counts a million tokens.

Hydra reads run_name=1e5 as the number 100000.0, run_name=1_000 as 1000 and run_name=null as none,
before it knows that the setting is text, knows no value that begins with a ~ or holds a =, no
count but plain digits, and no batch size that is auto.
"""

import re
import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from gns_pretrain.config.compose import INITIAL, RULE_OF_SCALE
from gns_pretrain.config.naming import is_token_count, token_count
from gns_pretrain.config.schema import VARIANTS, Config
from gns_pretrain.fields import at_home

CONFIG_DIR = "--config-dir="
# Values without signs of Hydra's own, save commas, which separate those of a sweep, and ${..}.
PLAIN = r"(?:[^'\"()\[\]{}\\$]|\$\{[^'\"()\[\]{}\\]*\})*"
ASSIGNMENT = re.compile(rf"(\+{{0,2}}([\w.]+)=)(\[?)({PLAIN})(\]?)")
NOT_TEXT = re.compile(
    r"~.*|.*=.*|null|true|false|[+-]?(?:inf|nan|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d[\d_]*)?)",
    re.IGNORECASE,
)


def as_typed(word: str) -> str:
    """Write a word of a command line so that Hydra takes it as it was meant.

    Values that it would not leave as text are quoted, and counts of tokens written out. W&B's
    agents begin a setting with --.
    """
    if word.startswith(CONFIG_DIR):
        return CONFIG_DIR + at_home(word.removeprefix(CONFIG_DIR))
    section = re.match(r"--(\w+)[\w.]*=", word)
    if section and section[1] in {field.name for field in fields(Config)}:
        word = word.removeprefix("--")
    if not (assignment := ASSIGNMENT.fullmatch(word)):
        return word
    before, name, opened, values, closed = assignment.groups()
    kinds = known_settings().get(name, set())
    written = values.split(",")
    if name == INITIAL:
        written = [RULE_OF_SCALE if value == "auto" else value for value in written]
    if (list[str] if opened else str) in kinds:
        stays = {"null"} if type(None) in kinds else set()
        written = [
            f'"{value}"' if NOT_TEXT.fullmatch(value) and value not in stays else value
            for value in written
        ]
    elif (list[int] if opened else int) in kinds and is_token_count(name):
        counts = map(token_count, written)
        written = [v if n is None else str(n) for v, n in zip(written, counts, strict=True)]
    return f"{before}{opened}{','.join(written)}{closed}"


@cache
def known_settings() -> dict[str, set[Any]]:
    """The settings of a run, by dotted names, and of which types they may be."""
    found = _settings_of(Config)
    for group, schemas in VARIANTS.items():
        for schema in schemas.values():
            for name, kinds in _settings_of(schema, f"{group}.").items():
                found[name] = found.get(name, set()) | kinds
    return found | {"init.from": {str, type(None)}}  # a mapping's, since `from` is no field's name


def _settings_of(schema: type, prefix: str = "") -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found |= _settings_of(hint, f"{prefix}{field.name}.")
        else:
            kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
            found[prefix + field.name] = kinds
    return found
