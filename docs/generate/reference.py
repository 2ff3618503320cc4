"""Write docs/reference/settings.md, commands.md and record.md from the code.

python docs/generate/reference.py

A setting's name, type, default and rule are those that the code checks, its meaning is the comment
beside its field; a command's text is that of its --help.
"""

import ast
import dataclasses
import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from gns_pretrain.commands import COMMANDS
from gns_pretrain.config.register import CONFIG_FOLDER
from gns_pretrain.config.schema import VARIANTS, Config, TunedSettings
from gns_pretrain.fields import About, Bound
from gns_pretrain.tracking.jsonl import (
    BatchSizeLine,
    NoiseLine,
    ShadowLine,
    TrainLine,
    ValidationLine,
)
from gns_pretrain.training.initialize import InitSettings

FOLDER = Path(__file__).parents[1] / "reference"
HEADER = "| setting | type | default | meaning; rule |\n|---|---|---|---|\n"
SETTINGS = """\
# Settings

<!-- Written by docs/generate/reference.py: change the comments beside the fields instead. -->

Every setting of `python train.py` and `gns-pretrain train`, by its dotted path, as in
`optimizer.lr=1e-3`. A group is chosen by its name, `optimizer=muon`, its files are below its table;
`python train.py --cfg job` prints the values of a command. The defaults are those of the classes;
`conf/train.yaml` and the chosen files set others, which stand behind an arrow where
`python train.py` takes them. Tokens, sequences and steps are counted over all ranks, a loss is in
nats per token.

"""


COMMANDS_PAGE = """\
# Commands

<!-- Written by docs/generate/reference.py from the commands' own texts. -->

`gns-pretrain NAME ...` is the same as `python -m gns_pretrain NAME ...` and, in a checkout,
`python scripts/NAME.py ...` with underscores, or `python train.py ...`. `--help` lists a command's
options. In a checkout there is also `python scripts/benchmark.py` ([speed](../performance.md)).

Exit codes: 0 finished; 1 a replay that takes another path; 2 a setting or file to correct, reported
on one line, nothing written; 3 the run cannot continue (a loss that is not finite, a full disk); 75
saved after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C: the same command resumes.

"""

RECORD = """\
# The record

<!-- Written by docs/generate/reference.py: change the comments beside the fields instead. -->

`metrics.jsonl` of a run has one JSON object per line. `kind` comes first and says which fields
follow. A line may have further fields than those listed (a noise line of `noise_scale.per_kind`, a
step that was skipped); a reader should pass over what it does not know.

```json
{"kind":"validation","step":1,"tokens":1024,"loss":8.7917}
{"kind":"batch_size","step":10,"from":16,"to":24,"target":24.56,"lr_multiplier":1.225}
```
"""


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def pages() -> dict[str, str]:
    """The text of each page by its file's name."""
    return {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "record.md": record_page(),
    }


def commands_page() -> str:
    """Each command's summary and the text of its --help, without options."""
    parts = [COMMANDS_PAGE, "| command | what it does |\n|---|---|\n"]
    parts += [f"| [`{name}`](#{name}) | {it.summary} |\n" for name, it in COMMANDS.items()]
    for name, command in COMMANDS.items():
        text = inspect.cleandoc(importlib.import_module(command.module).__doc__ or "")
        parts.append(f"\n## {name}\n\n```text\n{text}\n```\n")
    return "".join(parts)


def record_page() -> str:
    """A table of the fields of each kind of line."""
    parts = [RECORD]
    for cls in (TrainLine, ValidationLine, NoiseLine, BatchSizeLine, ShadowLine):
        parts += [
            f"\n## {cls.kind}\n\n{summary(cls)}\n\n",
            "| field | type | meaning |\n|---|---|---|\n",
        ]
        for field in dataclasses.fields(cls):
            if field.name != "more":
                cells = [
                    f"`{cls.written_as.get(field.name, field.name)}`",
                    kind(typing.get_type_hints(cls)[field.name]),
                    comments_of(cls).get(field.name, ""),
                ]
                parts.append(f"| {' | '.join(map(escaped, cells))} |\n")
    return "".join(parts)


def settings_page() -> str:
    """A table for each section of a run's settings."""
    values = values_of_default_run()
    parts = [SETTINGS, "## The run\n\n", HEADER, *rows(Config, "", values, plain_only=True)]
    for field in dataclasses.fields(Config):
        schema = typing.get_type_hints(Config)[field.name]
        if field.name == "init":
            parts += section("init", InitSettings, values)
        elif field.name in VARIANTS:
            parts += [*section(field.name, schema, values), *choices(field.name)]
            prefix = f"{field.name}."
            shared = set(rows(schema, prefix, {}))
            for name, variant in VARIANTS[field.name].items():
                used = values if name in ("llama", "data") else {}
                own = [row for row in rows(variant, prefix, used) if row not in shared]
                own = [row for row in own if not row.startswith(f"| `{prefix}name`")]
                title = f"\n### Further settings of `{name}`\n\n{summary(variant)}\n\n"
                parts += [title, HEADER, *own]
        elif dataclasses.is_dataclass(schema):
            parts += [*section(field.name, schema, values), *choices(field.name)]
    return "".join(parts)


def section(name: str, schema: Any, values: dict[str, Any]) -> list[str]:
    """A heading, what the class says of itself, and its table."""
    return [f"\n## {name}\n\n{summary(schema)}\n\n", HEADER, *rows(schema, f"{name}.", values)]


def rows(
    schema: Any, prefix: str, values: dict[str, Any], *, plain_only: bool = False
) -> Iterator[str]:
    """A table's row for each field; for a field that is a class, the rows of that."""
    hints = typing.get_type_hints(schema, include_extras=True)
    comments = comments_of(schema)
    for field in dataclasses.fields(schema):
        notes: tuple[Any, ...] = ()
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Annotated:
            hint, notes = hint.__origin__, hint.__metadata__
        if dataclasses.is_dataclass(hint):
            if hint is not TunedSettings and not plain_only:
                yield from rows(hint, f"{prefix}{field.name}.", values)
            elif hint is TunedSettings and field.name == "muon":  # once: all are alike
                yield from rows(hint, f"{prefix}OPTIMIZER.", {})
            continue
        if plain_only and field.name == "init":
            continue
        name = "from" if (schema, field.name) == (InitSettings, "source") else field.name
        path = prefix + name
        meanings = [note.text for note in notes if isinstance(note, About)]
        rules = [rule(note) for note in notes if isinstance(note, Bound) and not note.is_path]
        said = "; ".join(filter(None, [*meanings, comments.get(field.name), *rules]))
        cells = [f"`{path}`", kind(hint), default(field, values.get(path, field)), said]
        yield f"| {' | '.join(map(escaped, cells))} |\n"


def default(field: dataclasses.Field[Any], used: Any) -> str:
    """A field's default, and the value of the default run where that is another."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    needed = value is dataclasses.MISSING or value == MISSING
    shown = "required" if needed else f"`{plain(value)}`"
    if isinstance(used, dataclasses.Field) or used == value or str(used) in (MISSING, str(value)):
        return shown
    return f"`{plain(used)}`" if needed else f"{shown} → `{plain(used)}`"


def plain(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(value)


def kind(hint: Any) -> str:
    """A type in words."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]
    names = []
    for part in parts:
        if typing.get_origin(part) is list:
            (item,) = typing.get_args(part)
            names.append(f"list of {getattr(item, '__name__', item)}")
        else:
            names.append("null" if part is type(None) else getattr(part, "__name__", str(part)))
    return " or ".join(names)


def rule(bound: Bound) -> str:
    """What has to hold, with the hint of a refusal."""
    text = bound.text.removeprefix("must ").removeprefix("be ")
    text = text or f"one of {', '.join(bound.choices)}"
    return f"{text} ({bound.hint})" if bound.hint else text


def comments_of(schema: Any) -> dict[str, str]:
    """The comments above and beside each field in the source, bases first."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        lines = textwrap.dedent(inspect.getsource(typing.cast(type, cls))).splitlines()
        (body,) = ast.parse("\n".join(lines)).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                assert node.end_lineno is not None
                first, last = node.lineno - 1, node.end_lineno
                above = first
                while lines[above - 1].lstrip().startswith("#"):
                    above -= 1
                beside = [line.partition("  # ")[2] for line in lines[first:last]]
                words = [line.lstrip("# ") for line in lines[above:first]] + beside
                if text := " ".join(word for word in words if word).strip():
                    found[node.target.id] = text
    return found


def summary(schema: Any) -> str:
    """The first paragraph of a class's docstring."""
    return inspect.cleandoc(schema.__doc__).partition("\n\n")[0]


def choices(group: str) -> Iterator[str]:
    """A table of a group's files, with the comment that each begins with."""
    paths = sorted((CONFIG_FOLDER / group).glob("*.yaml"))
    if paths:
        yield f"\n| `{group}=` | what it is |\n|---|---|\n"
    for path in paths:
        lines = path.read_text().splitlines()
        said = []
        for line in lines:
            if not line.startswith("#") or line.startswith("#  "):
                break
            if not line.startswith("# @package"):
                said.append(line.lstrip("# "))
        yield f"| `{path.stem}` | {escaped(' '.join(said))} |\n"


def values_of_default_run() -> dict[str, Any]:
    """What conf/train.yaml and its choices set."""
    values: dict[str, Any] = {}
    train = OmegaConf.load(CONFIG_FOLDER / "train.yaml")
    files = [("", CONFIG_FOLDER / "train.yaml")]
    for entry in train.defaults:
        if OmegaConf.is_dict(entry):
            ((group, choice),) = entry.items()
            if not str(group).startswith("override"):
                files.append((f"{group}.", CONFIG_FOLDER / str(group) / f"{choice}.yaml"))
    for prefix, path in files:
        content = OmegaConf.to_container(OmegaConf.load(path))
        for name, value in typing.cast(dict[str, Any], content).items():
            if name not in ("defaults", "hydra"):
                values[prefix + name] = value
    return values


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
