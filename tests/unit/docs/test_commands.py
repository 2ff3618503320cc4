"""Every command of README.md and docs/ is one that the programs themselves accept.

Settings are composed by the project's own Hydra entry, options by each command's own parser;
nothing is trained. A block whose first line is `# PATH` is the file PATH of that page's commands. A
line that is followed by `error: ...` must fail with just that.
"""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode

from benchmarks import cli
from gns_pretrain.batch_size.policies import POLICIES
from gns_pretrain.commands import COMMANDS
from gns_pretrain.commands import train as train_command
from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.geometries import GEOMETRIES
from gns_pretrain.optim import OPTIMIZERS
from hydra_plugins.gns_launchers import sweepers
from hydra_plugins.gns_launchers.launchers import SweepLauncher
from tests.end_to_end.in_process import Ended, command, ended

ROOT = Path(__file__).parents[3]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("slurm/*.md")]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


class Line(NamedTuple):
    """One command of a page."""

    page: str
    words: tuple[str, ...]  # the program first, as `train` or `make-table`
    error: str  # that the page shows below it; empty for none

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands_of(page: Path) -> Iterator[Line]:
    """The commands of a page that are the project's own."""
    for language, block in FENCE.findall(page.read_text()):
        if language in ("diff", "python", "yaml", "text") or FILE.match(block):
            continue
        lines = block.replace("\\\n", " ").splitlines()
        loop: list[str] = []  # a shell's variable, and its first value
        for number, line in enumerate(lines):
            following = lines[number + 1].strip() if number + 1 < len(lines) else ""
            error = following.removeprefix("error: ") if following.startswith("error: ") else ""
            if found := re.match(r" *for (\w+) in (\w+)", line):
                loop = list(found.groups())
            text = line.replace(f"${loop[0]}", loop[1]) if loop else line
            for words in own_commands(text):
                yield Line(str(page.relative_to(ROOT)), words, error)


def own_commands(line: str) -> Iterator[tuple[str, ...]]:
    """Those commands of a line of shell that are the project's, without what starts them."""
    lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # output that a block shows may have an apostrophe
        return
    simple: list[list[str]] = [[]]
    for token in tokens:
        if set(token) <= set(";&|<>"):
            simple.append([])
        else:
            simple[-1].append(token)
    for words in simple:
        for number, word in enumerate(words):
            after = [each for each in words[number + 1 :] if each != "..."]
            if " " in word and "python " in word:  # of sbatch --wrap
                yield from own_commands(word)
            elif word in ("gns-pretrain", "gns_pretrain") and after:
                yield tuple(after)
                break
            elif word in ("train.py", "slurm/train.sbatch"):
                yield ("train", *after)
                break
            elif word.startswith("scripts/") and word.endswith(".py"):
                yield (Path(word).stem.replace("_", "-"), *after)
                break
            elif word == "benchmarks" and words[number - 1] == "-m":
                yield ("benchmark", *after)
                break
            elif word.startswith("mine") and word.endswith(".py") and number:
                yield (word, *after)
                break


# A command that several pages show is taken once, on the first.
LINES = list(
    {
        (line.words, line.error): line for page in reversed(PAGES) for line in commands_of(page)
    }.values()
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder; what a page's own files register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", [])
    registries = [POLICIES, GEOMETRIES, OPTIMIZERS]
    before = [dict(registry) for registry in registries]
    yield tmp_path
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def trains_nothing(monkeypatch):
    """Stop where a run would begin; of a sweep, compose its first run.

    Hydra itself composes a run once more to know whether it is a sweep, and a sweep's runs once
    each: half a minute of these tests, for nothing that is looked at here.
    """

    make = Plugins.instantiate_launcher

    def instantiate_launcher(*args: object, **kwargs: object) -> SweepLauncher:
        launcher = make(*args, **kwargs)

        def compose_first(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
            try:
                launcher.compose(job_overrides[0])
            except InputError as error:
                if "has no value at scale=" not in str(error):  # a search is yet to find it
                    raise
            raise SystemExit(0)

        launcher.launch = compose_first
        return launcher

    def mode(hydra: Hydra, config_name: str, overrides: list[str]) -> RunMode | None:
        sweeps = any(word.startswith("+sweep=") for word in overrides)
        return RunMode.MULTIRUN if sweeps else None

    monkeypatch.setattr(train_command, "launch", lambda config: 0)
    monkeypatch.setattr(sweepers, "branches", lambda settings: [[]])  # those of a run to come
    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate_launcher)
    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", lambda *_: None)
    monkeypatch.setattr(Hydra, "get_mode", mode)


@pytest.fixture
def parses_only(monkeypatch):
    """Stop a command once its options are parsed."""

    def stopping(parse):
        def call(parser, args=None, namespace=None):
            parse(parser, args, namespace)
            raise SystemExit(0)

        return call

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(
            argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name))
        )


def run(words: Sequence[str], request: pytest.FixtureRequest) -> Ended:
    """Run a command as far as its settings or options are known."""
    program = words[0]
    if program == "demo":  # hands its settings to two runs
        return run(("train", "+experiment=demo/adaptive", *words[1:]), request)
    if program == "train" or program.endswith(".py"):
        request.getfixturevalue("trains_nothing")
        if program == "train":
            return command(*words)
        sys.argv = list(words)
        return ended(lambda: runpy.run_path(program, run_name="__main__"))
    request.getfixturevalue("parses_only")
    if program == "benchmark":
        return ended(lambda: cli.main(words[1:]))
    assert program in COMMANDS
    return command(*words)


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows."""
    for _, block in FENCE.findall(page.read_text()):
        if found := FILE.match(block):
            path = folder / found[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_is_accepted(line, folder, request):
    write_files(ROOT / line.page, folder)
    if line.error:
        end = command(*line.words)  # as it is: nothing starts
        assert (end.code, end.lines) == (2, [f"error: {line.error}"])
    else:
        end = run(line.words, request)
        assert end.code in (0, None), end


def test_pages_have_commands_of_every_kind():
    programs = {line.words[0] for line in LINES}
    assert programs >= {"train", "prepare-data", "make-table", "plot-runs", "replay", "benchmark"}
    assert sum(bool(line.error) for line in LINES) >= 2
