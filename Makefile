# Two commands set everything up on a fresh machine: `make demo` runs the main job, `make test` passes the tests.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Handed to pip. Torch's CPU build: make demo PIP_ARGS="--extra-index-url <the index of CPU wheels that pytorch.org names>"
PIP_ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all floors lint types docs check clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable '.[photos]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable '.[dev]'
	touch $@

install: $(VENV)/.installed  ## install the package into .venv

demo: install  ## reconstruct real photographs with the shipped coder; writes demo/report.html
	$(BIN)/rac demo --out demo

test: $(VENV)/.installed-dev  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not slow and not gpu'

test-all: $(VENV)/.installed-dev  ## the slow tests as well
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not gpu'

# torch apart, of which few versions fit a given Python.
FLOORS := $(shell sed -n '/^dependencies/,/^]/s/^  "\([^>]*\)>=\([^"]*\)".*/\1==\2/p' pyproject.toml | grep -v '^torch==')
floors:  ## the fast unit tests on the oldest versions that pyproject.toml declares, in .venv-floors
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest hypothesis $(FLOORS)
	OMP_NUM_THREADS=1 $(VENV)-floors/bin/python -m pytest -m 'not slow and not gpu' tests/unit

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## the site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs test  ## all of it

clean:  ## remove what the commands above made
	rm -rf $(VENV) $(VENV)-floors demo build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
