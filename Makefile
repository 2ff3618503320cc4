# Four commands: train (the demo), test, check, docs (the site, into site/). Each installs what it needs into .venv first.
# slurm and browser put Debian's SLURM and Chromium on this machine, so that the tests that submit real jobs, and the one
# that opens a report, are not skipped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test check docs slurm browser clean

train: $(VENV)/.training
	$(BIN)/python scripts/demo.py

test: $(VENV)/.development
	$(BIN)/python -m pytest

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.development
	$(BIN)/zensical build --clean --strict

slurm:
	tests/slurm/install.sh

browser:
	tests/install_browser.sh

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp a set of packages; touched anew when the pins or the package's own needs change.
# torch goes first and by its exact version: a range can fetch gigabytes of another build.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "installing torch into $(VENV) ..."
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.training: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing the packages for training ..."
	$(INSTALL) --editable ".[figures]"
	@touch $@

$(VENV)/.development: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing the packages for training, data, tracking, figures, tests and checks ..."
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.training

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
