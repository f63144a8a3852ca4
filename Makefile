# Every target sets itself up: a bare checkout and Python 3.11 or newer with pip are enough.
#   make demo    compile the shipped model and generate text with it      make check   ruff and mypy
#   make test    the tests that run on any machine                        make bench   the benchmark tables
#   make docs    the documentation as a site, in build/site
#   make test-engines   vLLM, llama.cpp, gptqmodel, TensorRT-Edge-LLM and OpenVINO read what we write (7 GB, half an hour)
#   make gpu     kernels on a GPU: checks and times, in under eight minutes; sets nothing up

.DELETE_ON_ERROR:
.PHONY: help setup test test-slow test-gpu test-engines demo check format bench gpu matrix docs clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# One thread per worker: with more, two test processes would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

help:
	@sed -n '2,6s/^# *//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@.ci/make-venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup
	$(PYTEST) -m 'not slow and not gpu and not tensorrt and not engines'

test-slow: setup
	$(PYTEST) -m 'slow and not gpu and not tensorrt and not engines'

test-gpu: setup
	$(BIN)/python -m pytest -m 'gpu or tensorrt'

# Engines that are not ours read checkpoints and ONNX, each in an environment of its own: make test-engines ENGINES=llama.cpp
ENGINES ?= llama.cpp vllm gptqmodel edgellm openvino
test-engines: setup $(ENGINES:%=.venv-engines/%/.installed)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -p no:randomly -m engines tests/engines

.venv-engines/%/.installed: .ci/engines/%.txt
	.ci/make-engine .venv-engines/$* $<

demo: setup
	$(BIN)/python examples/demo.py

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy qcompiler tests examples

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Benchmarks need more text than examples/text holds: make bench CALIB=calibration.txt TEXT=held-out.txt
MODEL ?= examples/booklm
bench: setup
	$(BIN)/python -m benchmarks.quality $(MODEL) --calib $(CALIB) --text $(TEXT)
	$(BIN)/python -m benchmarks.memory

# Kernels on a GPU: checks, times, benchmarks/results/gpu.md. Takes the first Python that has what it needs, and installs
# nothing: the machine may have no network. GPU="--quick --only linear" passes options on.
gpu:
	@for python in $(PYTHON) $(BIN)/python python3 python; do \
	  if "$$python" -c 'import sys; from importlib.util import find_spec; sys.exit(sys.version_info < (3, 11) or None \
	    in map(find_spec, ("numpy", "safetensors", "torch", "transformers", "triton")))' 2>/dev/null; then \
	    exec "$$python" -m benchmarks.kernels $(GPU); \
	  fi; \
	done; \
	echo "make gpu: no Python 3.11 or newer here has numpy, safetensors, torch, transformers and triton." \
	  "Name one: make gpu PYTHON=/path/to/python" >&2; exit 2

# The table of recipes and targets in README.md; a test fails when it is stale.
matrix: setup
	$(BIN)/python -m docs.update_matrix

# Fails at a link that leads nowhere.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .ci/mkdocs.yml

clean:
	rm -rf $(VENV) .venv-engines build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
