# The two commands of the README: `make run` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests use one thread each, so two processes use two cores; each process's tests of Ray share one cluster.
PARALLEL ?= -n 2 --dist loadfile
# Fills the machine's memory, so nothing may run beside it.
ALONE := tests/ray/test_memory_monitor.py

.PHONY: run test check quick ray slow clean
.DEFAULT_GOAL := run

run: $(VENV)/.installed
	$(BIN)/fedgraft run

test: check quick ray slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(PARALLEL)

ray: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "ray and not gpu" $(PARALLEL) --ignore $(ALONE)
	$(BIN)/python -m pytest -q -m "ray and not gpu" $(ALONE)

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "slow and not gpu and not ray" $(PARALLEL)

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), 'Python 3.11 or 3.12 is needed: make PYTHON=python3.11'"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
