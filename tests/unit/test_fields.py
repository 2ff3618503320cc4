import argparse
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from omegaconf import OmegaConf

from gns_pretrain.errors import InputError
from gns_pretrain.fields import (
    About,
    Settings,
    add_options,
    at_least,
    at_most,
    from_options,
    key_of,
    one_of,
    path_argument,
    path_name,
    positive,
    within,
)


@dataclass
class Sample(Settings):
    section: ClassVar[str] = "part.sample"

    steps: Annotated[int, at_least(1, "step", hint="the paper uses 100")] = 100
    rate: Annotated[float | None, positive()] = None
    share: Annotated[float, within(0, 1, exclusive=True)] = 0.5
    end: Annotated[float, at_least(0), at_most(1, hint="0 ends at zero")] = 0.0
    kinds: Annotated[list[str], one_of("a", "b")] = field(default_factory=list)


@dataclass
class Options(Settings):
    section: ClassVar[str] = "--"

    out: Annotated[str, About("folder, 100 % of it")]
    max_steps: Annotated[int, at_least(1), About("of training")] = 3
    files: Annotated[list[str], About("to read")] = field(default_factory=list)
    bos: bool = True
    limit: float | None = None


@dataclass
class Paths(Settings):
    section: ClassVar[str] = "--"

    folder: Annotated[str, path_name()]
    files: Annotated[list[str], path_name()] = field(default_factory=list)
    cache: Annotated[Path | None, path_name()] = None


def test_a_tilde_is_the_home_directory_wherever_a_path_is_given(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = Paths("~/a b", files=["~/*.jsonl", "b/~c", "./~d"], cache=Path("~/e"))
    assert paths.folder == "/home/me/a b"
    assert paths.files == ["/home/me/*.jsonl", "b/~c", "./~d"]
    assert paths.cache == Path("/home/me/e")
    assert Paths("~").folder == "/home/me"
    assert Paths("x").cache is None
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=path_argument)
    assert parser.parse_args(["--out=~/out"]).out == Path("/home/me/out")


def test_home_directory_that_is_not_known_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, a user without a name
    with pytest.raises(InputError, match=r"^~/a: this home directory is not known; write the path"):
        Paths("~/a")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=path_argument)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out=~/a"])
    assert "argument --out: ~/a: this home directory is not known" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"folder": ""}, {"folder": "a", "files": ["b", ""]}])
def test_an_empty_path_is_refused(values):
    with pytest.raises(InputError, match="is not a path; name one"):
        Paths(**values)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"steps": 0},
            "part.sample.steps=0 must be at least 1 step; the paper uses 100",
        ),
        ({"rate": math.inf}, "part.sample.rate=inf must be positive and finite"),
        ({"rate": math.nan}, "part.sample.rate=nan must be positive and finite"),
        ({"share": 1.0}, "part.sample.share=1.0 must lie between 0 and 1 (exclusive)"),
        ({"end": -0.5}, "part.sample.end=-0.5 must be at least 0"),
        ({"end": 1.5}, "part.sample.end=1.5 must be at most 1; 0 ends at zero"),
        ({"kinds": ["a", "c"]}, "part.sample.kinds=[a, c] is not known; use one of a, b"),
    ],
)
def test_value_outside_its_bounds_is_one_line_with_setting_value_rule_and_hint(values, line):
    with pytest.raises(InputError) as error:
        Sample(**values)
    assert str(error.value) == line


def test_omegaconf_composes_against_an_annotated_class_and_checks_it():
    node = OmegaConf.structured(Sample)
    node.rate = 0.1
    assert OmegaConf.to_object(node) == Sample(rate=0.1)
    node.steps = -1
    with pytest.raises(InputError, match=r"part\.sample.steps=-1"):
        OmegaConf.to_object(node)


def parsed(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    assert "of training (default: 3)" in parser.format_help()
    return from_options(Options, parser.parse_args(words))


def test_command_line_of_a_class_reads_numbers_lists_flags_and_leaves_defaults_to_it():
    assert parsed("--out", "x") == Options("x")
    words = ("--out", "x", "--max-steps", "1_000", "--files", "a", "b", "--no-bos", "--limit", "2")
    assert parsed(*words) == Options("x", 1000, ["a", "b"], False, 2.0)


def test_positional_list_takes_what_is_typed_without_a_name():
    @dataclass
    class Launch(Settings):
        overrides: Annotated[list[str], About("settings", positional=True)] = field(
            default_factory=list
        )
        starts: int = 3

    parser = argparse.ArgumentParser()
    add_options(parser, Launch)
    assert from_options(Launch, parser.parse_args([])) == Launch([], 3)
    assert from_options(Launch, parser.parse_args(["--starts", "1", "a=1", "b=2"])) == Launch(
        ["a=1", "b=2"], 1
    )


def test_command_line_names_the_option_that_is_outside_its_bounds():
    with pytest.raises(InputError, match=r"^--max-steps=0 must be at least 1$"):
        parsed("--out", "x", "--max-steps", "0")


def test_registry_may_grow_after_the_class_was_made():
    registry = {"a": 1}

    @dataclass
    class Late(Settings):
        section: ClassVar[str] = "late"

        kind: Annotated[str, key_of(registry)] = "a"

    with pytest.raises(InputError, match=r"late\.kind=b is not known; use one of a$"):
        Late("b")
    registry["b"] = 2
    assert Late("b").kind == "b"


def test_a_command_with_defaults_of_its_own_shows_none():
    parser = argparse.ArgumentParser()
    add_options(parser, Options, skip=["out"], show_defaults=False)
    assert "of training\n" in parser.format_help()
    assert "default" not in parser.format_help()
