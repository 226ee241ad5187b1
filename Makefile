# make demo         sets everything up and runs the quickstart
# make test         sets everything up and runs all tests
# make check        format, lint, types
# make docs         builds the documentation in docs/_build/html; a warning is an error
# make gpu-compile  compiles every kernel and the engine's programs for H200 and A100, without a GPU
#                   (QUICK=1: for H200 alone, the kernels of one model, the programs of four layers)
# make bench        measures against transformers + PEFT on this CPU
# make clean        removes the virtual environment, runs and caches
#
# Needs only a Python of 3.11 or newer; PYTHON=... chooses one. Setting up is done once.

VENV := .venv
GPU_VENV := .venv-gpu
BIN := $(VENV)/bin
DEMO := runs/demo-world
QUICKSTART := configs/quickstart.yaml
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A build of torch for CPUs is a tenth of the default one. Tests need no more than that.
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

export TRANSFORMERS_NO_ADVISORY_WARNINGS := 1

.DELETE_ON_ERROR:
.PHONY: demo test check docs gpu-compile bench clean

demo: $(VENV)/.runtime
	$(BIN)/python scripts/make_demo_model.py --out $(DEMO)
	$(BIN)/python scripts/coserve.py --config $(QUICKSTART) --set finetune.jobs.0.resume=false \
		--ask "Tell me about Sara." --ask "Who is Felix?" --ask "Tell me about Laura."

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

gpu-compile: $(GPU_VENV)/.compiler
	$(GPU_VENV)/bin/python scripts/gpu_compile.py $(if $(QUICK),--quick --chip h200)

bench: $(VENV)/.test
	$(BIN)/python scripts/benchmark_peft.py

clean:
	rm -rf $(VENV) $(GPU_VENV) runs docs/_build docs/_generated .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python of 3.11 or newer found; install one, or give PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	$(PIP) install --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -c 'import urllib.request as r; r.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' \
		2>/dev/null && index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	$(PIP) install $$index $(TORCH)
	$(PIP) install --editable ".[test]"
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(PIP) install --editable ".[docs]"
	@touch $@

# XLA's compiler for GPUs, in an environment of its own: beside it, jax looks for a GPU at every start.
$(GPU_VENV)/.compiler: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --editable .
	version=$$($(GPU_VENV)/bin/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	@touch $@
