"""`from gns_pretrain import ...`: what others import, and that it needs torch and numpy only."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

import gns_pretrain
from tests.installed import ROOT, required_files

# Nothing but torch, numpy and what they need: the rest seems not to be installed.
IMPORT_ALL = """
import json, sys

allowed = {*sys.stdlib_module_names, *json.loads(sys.argv[1]), "gns_pretrain"}

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import gns_pretrain
assert "torch" not in sys.modules, "importing the package should not take seconds"
for name in gns_pretrain.__all__:
    getattr(gns_pretrain, name)
try:
    import hydra
except ModuleNotFoundError:
    print("done")
"""


@pytest.mark.parametrize("name", gns_pretrain.__all__)
def test_exported_name_has_a_docstring_and_is_exported_by_its_package(name):
    exported = getattr(gns_pretrain, name)
    assert exported.__doc__
    assert name in dir(gns_pretrain)
    package = import_module(".".join(exported.__module__.split(".")[:2]))
    assert getattr(package, name) is exported


def test_name_that_is_not_exported_is_no_attribute():
    with pytest.raises(ImportError, match="cannot import name 'NoiseMetre'"):
        from gns_pretrain import NoiseMetre  # type: ignore[attr-defined]  # noqa: F401


def test_library_needs_torch_and_numpy_only():
    allowed = json.dumps(
        sorted({name.partition(".")[0] for name in required_files("torch", "numpy")})
    )
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, allowed], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.stdout == "done\n", answer.stderr
