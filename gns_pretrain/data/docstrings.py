"""English text that is on every machine which can train: the docstrings of installed packages.

Files are found and parsed, never imported. `python -m gns_pretrain.data.docstrings` reads paths
from standard input, one per line, and writes a JSON list with the docstrings of each.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from inspect import cleandoc
from pathlib import Path

from gns_pretrain.system.processes import python_command, python_environment

# Fixed, in this order: the same versions give the same text everywhere. All come with torch.
PACKAGES = ("python", "numpy", "networkx", "sympy", "torch")
# Tests hold no prose; the site-packages of an interpreter lie inside its standard library.
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages")
)
# Below this share of its bytes between triple quotes, parsing a file costs more than its text is
# worth: leaving such files out saves half of the time and a seventh of the text.
MIN_QUOTED_SHARE = 0.2
MIN_CHARACTERS = 64  # of a docstring; shorter ones are labels
# They attach the documentation of what is written in C.
DOCUMENTING_CALLS = frozenset(("add_docstr", "add_newdoc", "add_newdoc_for_scalar_type"))
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")  # alone in a text, it cannot be encoded


def source_files() -> dict[str, Path]:
    """Find the packages' files by name (torch/nn/functional.py), sorted within each package."""
    files: dict[str, Path] = {}
    for package in PACKAGES:
        if package == "python":
            root = Path(sysconfig.get_path("stdlib"))
        elif (spec := importlib.util.find_spec(package)) and spec.origin:
            root = Path(spec.origin).parent
        else:
            continue
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        by_name = {f"{package}/{path.relative_to(root).as_posix()}": path for path in found}
        files.update(sorted(by_name.items()))
    return files


def extract(paths: list[Path], num_processes: int) -> list[list[str]]:
    """Extract the docstrings of each file, on several processes.

    Plain subprocesses: multiprocessing would import the caller's main module, with torch, in each.
    """

    def run(part: list[Path]) -> list[list[str]]:
        result = subprocess.run(
            python_command("gns_pretrain.data.docstrings"),
            input="\n".join(map(str, part)).encode(),
            stdout=subprocess.PIPE,
            env=python_environment(),
            check=True,
        )
        return json.loads(result.stdout)

    docstrings: list[list[str]] = [[]] * len(paths)
    with ThreadPoolExecutor(num_processes) as threads:
        parts = threads.map(run, [paths[k::num_processes] for k in range(num_processes)])
        for k, part in enumerate(parts):
            docstrings[k::num_processes] = part
    return docstrings


def docstrings_of(source: bytes) -> list[str]:
    """Return the docstrings in a file's source, in their order; none if it does not parse."""
    quoted = sum(map(len, _QUOTED.findall(source)))
    if quoted < MIN_QUOTED_SHARE * len(source):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escape sequences in the packages
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    texts = [cleandoc(text) for text in _raw_docstrings(tree)]
    return [text for text in texts if len(text) >= MIN_CHARACTERS and not _SURROGATE.search(text)]


def _raw_docstrings(node: ast.AST) -> list[str]:
    """Return those of a module, class or function and of what its body or branches define."""
    texts = []
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        texts += [text] if text else []
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                texts += _attached_documentation(child) or _raw_docstrings(child)
    return texts


def _attached_documentation(node: ast.AST) -> list[str]:
    """Return the strings of a call that documents something written in C, else []."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return []
    called = node.value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    if name not in DOCUMENTING_CALLS:
        return []
    parts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
    return [part for part in parts if isinstance(part, str)]


if __name__ == "__main__":
    import gc

    gc.disable()  # syntax trees hold no cycles worth looking for: a sixth of the time
    json.dump(
        [docstrings_of(Path(path).read_bytes()) for path in sys.stdin.read().splitlines()],
        sys.stdout,
    )
