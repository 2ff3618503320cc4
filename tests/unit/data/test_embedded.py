import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gns_pretrain.data import docstrings, embedded
from gns_pretrain.data.docstrings import docstrings_of
from gns_pretrain.data.embedded import ensure_embedded
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError

ROOT = Path(__file__).parents[3]
# The real packages take half a minute of processor time; one of them shows the same.
PACKAGES = ("networkx",)
LONG = "It says what the thing is for, at some length, so that it counts as text."


@pytest.fixture(autouse=True)
def one_package(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", PACKAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(docstrings, "PACKAGES", PACKAGES)
        return ensure_embedded(tmp_path_factory.mktemp("cache"), vocab_size=512)


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened = TokenShards.open(folder, split, verify=True)
    return tokenizer.decode(
        opened.read(0, opened.num_tokens).tolist(), skip_special_tokens=False
    ).split("<|begin_of_text|>")[1:]


def test_embedded_text_is_english_documentation_split_by_file(folder):
    training, validation = texts_of(folder, "train"), texts_of(folder, "validation")
    assert any("shortest path" in text for text in training)
    assert all(text.endswith("<|end_of_text|>") for text in training + validation)
    assert not set(training) & set(validation)
    # A small part, and by name of the file: deterministic, but not exactly 2 %.
    assert 0 < len(validation) < 0.1 * len(training)


def test_second_call_finds_the_first_ones_folder(folder, monkeypatch):
    monkeypatch.setattr(embedded, "_place", None)
    assert ensure_embedded(folder.parent, vocab_size=512) == folder


def test_same_packages_give_the_same_bytes(folder, tmp_path):
    again = ensure_embedded(tmp_path, vocab_size=512)
    assert again.name == folder.name
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_folder_without_meta_is_made_again(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    (copy / "meta.json").unlink()
    assert ensure_embedded(tmp_path, vocab_size=512) == copy
    assert (copy / "meta.json").read_bytes() == (folder / "meta.json").read_bytes()


def test_processes_at_once_make_it_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gns_pretrain.data import docstrings, embedded\n"
        f"docstrings.PACKAGES = {PACKAGES}\n"
        f"print(embedded.ensure_embedded(vocab_size=300))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GNS_PRETRAIN_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({printed for printed, _ in results}) == 1
    assert sum("making the embedded text" in output for _, output in results) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(results[0][0].strip()).name]


def test_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file.*GNS_PRETRAIN_CACHE"):
        ensure_embedded(tmp_path / "file" / "cache")


@pytest.mark.parametrize("variable", ["", "~nobody-has-this-name/cache"])
def test_home_directory_that_is_not_known_is_one_line(monkeypatch, variable):
    monkeypatch.setenv("GNS_PRETRAIN_CACHE", variable)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, a user without a name
    with pytest.raises(InputError, match=r"embedded text has no folder: .*GNS_PRETRAIN_CACHE$"):
        ensure_embedded()


def test_docstrings_come_in_order_and_without_labels():
    source = f'''
"""Module. {LONG}"""
if True:
    class Thing:
        """Class. {LONG}"""
        def method(self):
            """Method.

                {LONG}
            """
            def inner(): "Inner. {LONG}"
        def short(self):
            """Too short."""
        text = """Not a docstring. {LONG}"""
try:
    pass
except ValueError:
    async def other():
        """Other. {LONG}"""
add_docstr(thing, r"""Documents C. {LONG}""".format(**common))
print("""Printed. {LONG}""")
'''
    found = docstrings_of(source.encode())
    assert found == [
        f"Module. {LONG}",
        f"Class. {LONG}",
        f"Method.\n\n{LONG}",
        f"Inner. {LONG}",
        f"Other. {LONG}",
        f"Documents C. {LONG}",
    ]


@pytest.mark.parametrize(
    "source",
    [
        f'"""{LONG}"""\ndef f(:'.encode(),  # does not parse
        f'"""{LONG}"""\n\0'.encode(),
        f'"""{LONG} \\ud800"""'.encode(),  # not Unicode
        f'"""{LONG}"""\n'.encode() + b"x = 1\n" * 100,  # nearly all code
    ],
)
def test_files_that_give_no_text_are_passed_over(source):
    assert docstrings_of(source) == []


def test_packages_are_found_without_being_imported(tmp_path):
    code = (
        "import sys; from gns_pretrain.data.docstrings import source_files\n"
        "files = source_files()\n"
        "assert not {'numpy', 'networkx', 'sympy', 'torch'} & set(sys.modules)\n"
        "import json; print(json.dumps(list(files)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = json.loads(result.stdout)
    packages = [name.partition("/")[0] for name in names]
    assert list(dict.fromkeys(packages)) == ["python", "numpy", "networkx", "sympy", "torch"]
    assert not [name for name in names if "/tests/" in name or "site-packages" in name]
    torch_names = [name for name in names if name.startswith("torch/")]
    assert torch_names == sorted(torch_names)
