# Every target sets itself up: a bare checkout and Python 3.11 or newer with pip are enough.
#   make demo    compile the shipped model and generate text with it      make check   ruff and mypy
#   make test    the tests that run on any machine                        make bench   the benchmark tables

.DELETE_ON_ERROR:
.PHONY: help setup test test-slow test-gpu demo check format bench matrix clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# One thread per worker: with more, two test processes would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

help:
	@sed -n '2,3s/^# *//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@.ci/make-venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup
	$(PYTEST) -m 'not slow and not gpu and not tensorrt'

test-slow: setup
	$(PYTEST) -m 'slow and not gpu and not tensorrt'

test-gpu: setup
	$(BIN)/python -m pytest -m 'gpu or tensorrt'

demo: setup
	$(BIN)/python examples/demo.py

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy qcompiler tests examples

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Benchmarks need text, which is not shipped: make bench CALIB=calibration.txt TEXT=held-out.txt
MODEL ?= examples/booklm
bench: setup
	$(BIN)/python -m benchmarks.quality $(MODEL) --calib $(CALIB) --text $(TEXT)
	$(BIN)/python -m benchmarks.memory

# The table of recipes and targets in README.md; a test fails when it is stale.
matrix: setup
	$(BIN)/python -m docs.update_matrix

clean:
	rm -rf $(VENV) build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
