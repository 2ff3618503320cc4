"""The pinned packages install on every Python that the project allows."""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


def test_every_pin_takes_the_oldest_python_that_the_project_takes():
    # 3.11.0 to 3.11.4 are what some distributions have: a pin for 3.11.5 left them without tests.
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = f"{asked.removeprefix('>=')}.0"
    pins = [
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    ]
    refusing, looked_at = [], 0
    for name in pins:
        try:
            needed = metadata(name)["Requires-Python"]
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        looked_at += 1
        if needed and oldest not in SpecifierSet(needed):
            refusing.append(f"{name}: {needed}")
    assert looked_at > 50
    assert refusing == []
