"""Settings whose bounds stand beside their fields, and command lines made of the same classes.

    @dataclass
    class SmoothingSettings(Settings):
        section: ClassVar[str] = "noise_scale.smoothing"

        noise_decay: Annotated[float, within(0, 1, hint="the paper uses 0.9")] = 0.9  # beta^N

`Annotated` is invisible to OmegaConf and to mypy, so the same class is the schema that Hydra
composes against, what the code reads and, through `add_options`, a script's command line.
"""

import argparse
import dataclasses
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

from gns_pretrain.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Bound:
    """A rule for one field: what has to hold, how a refusal says so, and a hint.

    Without a text, the refusal lists the choices.
    """

    holds: Callable[[Any], bool]
    text: str
    hint: str = ""
    choices: Collection[str] = ()
    is_path: bool = False  # the field holds a path, or several


@dataclass(frozen=True)
class About:
    """What a field means, for `--help`; positional: a list that is typed without `--name`."""

    text: str
    positional: bool = False


def at_least(bound: float, unit: str = "", *, hint: str = "") -> Bound:
    """A number, or each number of a list, that is not below `bound`."""
    text = f"must be at least {bound} {unit}".rstrip()
    return Bound(lambda value: all(v >= bound for v in _each(value)), text, hint)


def at_most(bound: float, *, hint: str = "") -> Bound:
    return Bound(lambda value: value <= bound, f"must be at most {bound}", hint)


def positive(*, hint: str = "") -> Bound:
    return Bound(lambda value: 0.0 < value < math.inf, "must be positive and finite", hint)


def within(low: float, high: float, *, hint: str = "", exclusive: bool = False) -> Bound:
    """A number of [low, high), or of (low, high) where `exclusive`."""
    if exclusive:
        text = f"must lie between {low} and {high} (exclusive)"
        return Bound(lambda value: low < value < high, text, hint)
    text = f"must be at least {low} and below {high}"
    return Bound(lambda value: low <= value < high, text, hint)


def path_name() -> Bound:
    """A path, or each path of a list, that is not empty; Settings put the home directory for ~."""
    return Bound(
        lambda value: all(str(v) for v in _each(value)), "is not a path", "name one", is_path=True
    )


def at_home(path: str) -> str:
    """Replace a leading ~ or ~user by that home directory; InputError if it is not known."""
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path drops what it takes for redundant
    if expanded.startswith("~"):
        raise InputError(f"{path}: this home directory is not known; write the path out")
    return expanded


def path_argument(text: str) -> Path:
    """A path of a command line, for argparse: a shell leaves the ~ of --out=~/x as it is."""
    try:
        return Path(at_home(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def one_of(*choices: str, hint: str = "") -> Bound:
    """A name, or each name of a list, that is one of `choices`."""
    return key_of(choices, hint=hint)


def key_of(registry: Collection[str], *, hint: str = "") -> Bound:
    """A name, or each name of a list, that a registry holds when the check is made."""
    return Bound(lambda value: all(v in registry for v in _each(value)), "", hint, registry)


class Settings:
    """Base of a settings dataclass: checks its fields' bounds as it is made, and expands paths.

    A subclass that defines `__post_init__` calls this one's first.
    """

    section: ClassVar[str] = ""  # dotted path in a run's configuration; "--" for a command line

    def __post_init__(self) -> None:
        check_bounds(self, self.section)
        cls: type = type(self)
        for name, notes in _notes(cls).items():
            if any(isinstance(note, Bound) and note.is_path for note in notes):
                setattr(self, name, _paths_at_home(getattr(self, name)))


def check_bounds(settings: Any, section: str) -> None:
    """Check every field against the bounds in its annotation; None is left to the field's type.

    Raises:
        InputError: the first field outside its bounds: setting, with the dotted path `section`
            before its name, value, rule and hint in one line.
    """
    cls: type = type(settings)
    for name, value in vars(settings).items():
        if any(isinstance(v, int) and abs(v) > LARGEST_INTEGER for v in _each(value)):
            raise InputError(
                f"{setting_name(section, name)}={value} must be at most {LARGEST_INTEGER}, which "
                "is what 64 bits hold"
            )
    check_values(cls, {name: getattr(settings, name) for name in _notes(cls)}, section)


def check_values(annotated: Any, values: Mapping[str, Any], section: str = "") -> None:
    """Check values against the bounds that a class or function has in its annotations."""
    notes_of = _notes(annotated)
    for name, value in values.items():
        for bound in (note for note in notes_of.get(name, ()) if isinstance(note, Bound)):
            if value is not None and not bound.holds(value):
                hint = f"; {bound.hint}" if bound.hint else ""
                shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else value
                text = bound.text or f"is not known; use one of {', '.join(bound.choices)}"
                raise InputError(f"{setting_name(section, name)}={shown} {text}{hint}")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check a function's arguments against the bounds in their annotations, at each call."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_values(function, inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call


def setting_name(section: str, name: str) -> str:
    """A field as the user types it: `data.path`, or `--data-path` on a command line."""
    if section == "--":
        return "--" + name.replace("_", "-")
    return f"{section}.{name}" if section else name


def script_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a script's docstring as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    name = Path(sys.argv[0]).name
    return argparse.ArgumentParser(name, description=about, formatter_class=formatter)


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    skip: Iterable[str] = (),
    show_defaults: bool = True,
) -> None:
    """Give a parser one option for each field of a settings dataclass.

    Fields without a default are required; lists take several words; `bool` gets a `--no-` form.
    Options that are not typed stay out of the namespace, so a default has one home: the class.

    Args:
        skip: names of fields that are no options.
        show_defaults: False for a command that takes its defaults from elsewhere.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        notes = _notes(cls).get(field.name, ())
        about = next((note for note in notes if isinstance(note, About)), About(""))
        bound = next((note for note in notes if isinstance(note, Bound) and note.choices), None)
        required = field.default is field.default_factory  # both are MISSING
        shown = show_defaults and isinstance(field.default, int | float | str)
        text = about.text + (f" (default: {field.default})" if shown else "")
        reading = _reading(hints[field.name])
        reading |= {"nargs": "*"} if about.positional else {"required": required}
        if bound:
            reading["metavar"] = "{" + ",".join(bound.choices) + "}"
        parser.add_argument(
            field.name if about.positional else setting_name("--", field.name),
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
            **reading,
        )


def from_options(cls: type[S], options: argparse.Namespace) -> S:
    """The settings that a parsed command line gives; other entries of it are left alone."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in vars(options).items() if name in names})


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is list:
        return {"nargs": "+", "type": typing.get_args(hint)[0]}
    return {"type": hint}


def _paths_at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_paths_at_home(each) for each in value]
    return value if value is None else type(value)(at_home(str(value)))


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


@cache
def _notes(annotated: Any) -> dict[str, tuple[Any, ...]]:
    """What `Annotated` says of each field, bases included, or argument."""
    hints = typing.get_type_hints(annotated, include_extras=True)
    return {
        name: hint.__metadata__
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated
    }
