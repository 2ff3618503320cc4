"""The package's wheel in an environment outside the checkout, with the packages of a choice."""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gns_pretrain", "hydra_plugins")


def required_files(*packages: str) -> dict[str, Path]:
    """The files and folders in site-packages of packages and of all that they require."""
    found: dict[str, Path] = {}
    waiting, seen = list(packages), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of an older Python or another platform
            continue
        tops = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
        found |= {top: Path(str(package.locate_file(top))) for top in tops}
        requirements = map(Requirement, package.requires or [])
        waiting += [
            r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
        ]
    return found


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is left in the checkout."""
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        copy = copytree if (ROOT / name).is_dir() else copy2
        options = {"ignore": ignore_patterns("__pycache__")} if copy is copytree else {}
        copy(ROOT / name, sources / name, **options)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(sources))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel and no other package; returns its site-packages."""
    venv.create(folder, symlinks=True)
    pip("--python", str(folder / "bin" / "python"), "install", str(wheel))
    (site_packages,) = folder.glob("lib/python*/site-packages")
    return site_packages


def pip(*words: str) -> None:
    """Run pip with what is here: no index, no dependencies."""
    at = words.index("install" if "install" in words else "wheel") + 1
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", *words[:at], *options, *words[at:]], check=True)


def add_required(site_packages: Path, *packages: str) -> None:
    """Add packages and all that they require, from the environment that runs the tests."""
    for name, path in required_files(*packages).items():
        (site_packages / name).symlink_to(path)


def add_everything(site_packages: Path) -> None:
    """Add what the environment that runs the tests has, but for its editable installations."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "everything.pth").write_text("\n".join(sorted(folders)))


def run(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a program of the environment in a folder; nothing names the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / "bin" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
