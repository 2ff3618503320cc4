"""The documentation site: it builds without a warning, and its pages are those of the code."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from shutil import copy2, copytree

import pytest
import yaml

import gns_pretrain

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="the site needs the extra docs")
    copytree(DOCS, tmp_path / "docs")
    copy2(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "gns_pretrain").symlink_to(ROOT / "gns_pretrain")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    library = (tmp_path / "site" / "reference" / "library" / "index.html").read_text()
    assert "Measures the noise scale of a model in single optimizer steps" in library


@pytest.mark.parametrize("name", ["settings.md", "commands.md", "record.md"])
def test_reference_page_is_that_of_the_code(name):
    pages = runpy.run_path(str(DOCS / "generate" / "reference.py"))["pages"]
    assert (DOCS / "reference" / name).read_text() == pages()[name], (
        "run python docs/generate/reference.py"
    )


def test_library_page_has_every_public_name():
    page = (DOCS / "reference" / "library.md").read_text()
    assert sorted(re.findall(r"^::: gns_pretrain\.(\w+)$", page, re.MULTILINE)) == sorted(
        gns_pretrain.__all__
    )


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/]+\.md", str(nav))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_picture_is_there_and_small():
    for page in [*PAGES, ROOT / "README.md"]:
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / name).stat().st_size < 200_000, f"{page}: {name}"


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), ROOT / "slurm" / "README.md"], ids=lambda page: page.name
)
def test_every_link_outside_of_the_site_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
