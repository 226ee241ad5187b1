# make demo         sets everything up and runs the quickstart
# make demo-rl      sets everything up and lets an adapter learn from rewards while requests are served
# make test         sets everything up and runs all tests
# make test-fast    the tests that start no engine and no server, for the loop while coding
# make test-newest  all tests in a new environment with the newest releases that pyproject.toml
#                   allows; if they fail, says which packages differ from the tested ones
# make fuzz         what clients send, made up, for the parsers: ten minutes of it
# make faults       a server under random faults for ten rounds: nothing may be lost; SEED=... repeats
# make check        format, lint, types
# make docs         builds the documentation in docs/_build/html; a warning is an error
# make gpu-compile  compiles every kernel and the engine's programs for H100, H200 and A100, without a GPU
#                   (QUICK=1: for H200 alone, the kernels of one model, the programs of four layers)
# make bench        measures against transformers + PEFT on this CPU
# make lock         finds the versions to test with, for every Python (.ci/constraints/py*.txt)
# make clean        removes the virtual environments, runs and caches
#
# Needs only a Python of 3.11 or newer; PYTHON=... chooses one, VENV=... another environment. Setting
# up is done once, with the versions in .ci/constraints/.

VENV := .venv
GPU_VENV := .venv-gpu
NEWEST_VENV := .venv-newest
LOCK_VENV := .venv-lock
BIN := $(VENV)/bin
DEMO := runs/demo-world
SEED = $(shell date +%Y%m%d)
QUICKSTART := configs/quickstart.yaml
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A build of torch for CPUs is a tenth of the default one. Tests need no more than that.
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_NEWEST := torch

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

# A file's tests share what they start, so a file stays with one worker; the longest come first.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What `make test-fast` runs: parts that start no engine and no server.
FAST := tests/test_architecture.py tests/test_deploy.py tests/config tests/scheduler tests/models \
	tests/peft tests/finetune/test_data.py tests/finetune/test_readers.py tests/kernels/test_tuning.py \
	tests/scripts/test_scripts_are_thin.py

LOCKED_PYTHONS := 3.11 3.12 3.13
LOCKED_EXTRAS := test docs
# The versions tested with this Python, or nothing: then pip takes the newest.
python_version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
LOCK = .ci/constraints/py$(subst .,,$(call python_version,$(BIN)/python)).txt
CONSTRAINTS = $(if $(wildcard $(LOCK)),--constraint $(LOCK))

ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(call python_version,$(PYTHON)),$(call python_version,$(BIN)/python))
$(error $(VENV) has Python $(call python_version,$(BIN)/python), $(PYTHON) is \
	$(call python_version,$(PYTHON)): run `make clean` first, or give VENV=... for a second environment)
endif
endif
endif

export TRANSFORMERS_NO_ADVISORY_WARNINGS := 1

.DELETE_ON_ERROR:
.PHONY: demo demo-rl test test-fast test-newest fuzz faults check docs gpu-compile bench lock clean

demo: $(VENV)/.runtime
	$(BIN)/python scripts/make_demo_model.py --out $(DEMO)
	$(BIN)/python scripts/coserve.py --config $(QUICKSTART) --set finetune.jobs.0.resume=false \
		--ask "Tell me about Sara." --ask "Who is Felix?" --ask "Tell me about Laura."

demo-rl: $(VENV)/.graders
	$(BIN)/python scripts/make_demo_model.py --out $(DEMO)
	$(BIN)/python scripts/coserve.py --config configs/reinforcement.yaml --set finetune.jobs.0.resume=false \
		--ask "Which city, job and pet has Sara?" --ask "Which city, job and pet has Felix?" \
		--ask "Tell me about Laura."

test: $(VENV)/.test
	$(PYTEST)

test-fast: $(VENV)/.test
	$(PYTEST) $(FAST)

fuzz: $(VENV)/.test
	$(PYTEST) tests/fuzz --hypothesis-profile=nightly

test-newest:
	rm -rf $(NEWEST_VENV)
	$(MAKE) $(NEWEST_VENV)/.test VENV=$(NEWEST_VENV) TORCH=$(TORCH_NEWEST) \
		CONSTRAINTS="--upgrade --upgrade-strategy eager"
	$(MAKE) test VENV=$(NEWEST_VENV) || { $(NEWEST_VENV)/bin/python .ci/constraints/compare.py; exit 1; }

faults: $(VENV)/.test
	$(BIN)/python scripts/make_demo_model.py --out $(DEMO)
	$(BIN)/python scripts/fault_campaign.py --config configs/serve.yaml --seed $(SEED)

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

# uv resolves for a Python that is not there. Packages of CUDA are left out: torch's builds for CPUs
# do without them.
lock:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip --disable-pip-version-check --quiet install uv
	echo "$(TORCH)" > $(LOCK_VENV)/torch.txt
	for version in $(LOCKED_PYTHONS); do \
		file=.ci/constraints/py$$(echo $$version | tr -d .).txt; \
		echo "# The versions tested with Python $$version on Linux. Made by \`make lock\`." > $$file; \
		$(LOCK_VENV)/bin/uv pip compile pyproject.toml $(LOCKED_EXTRAS:%=--extra %) --quiet \
			--python-version $$version --python-platform linux --constraint $(LOCK_VENV)/torch.txt \
			--default-index https://pypi.org/simple --no-header --no-annotate \
			| grep -v -e ^nvidia- -e ^cuda- -e ^triton= >> $$file || exit 1; \
	done
	rm -rf $(LOCK_VENV)

clean:
	rm -rf $(VENV) $(GPU_VENV) $(NEWEST_VENV) $(LOCK_VENV) runs docs/_build docs/_generated \
		.pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python of 3.11 or newer found; install one, or give PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: pyproject.toml $(wildcard .ci/constraints/*.txt) | $(BIN)/python
	@test -f $(LOCK) || echo "make: no $(LOCK): taking the newest versions that pyproject.toml allows"
	$(PIP) install $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.graders: $(VENV)/.runtime
	$(PIP) install $(CONSTRAINTS) --editable ".[graders]"
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -c 'import urllib.request as r; r.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' \
		2>/dev/null && index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	$(PIP) install $$index $(CONSTRAINTS) $(TORCH)
	$(PIP) install $(CONSTRAINTS) --editable ".[test]"
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(PIP) install $(CONSTRAINTS) --editable ".[docs]"
	@touch $@

# XLA's compiler for GPUs, in an environment of its own: beside it, jax looks for a GPU at every start.
$(GPU_VENV)/.compiler: pyproject.toml $(wildcard .ci/constraints/*.txt) | $(BIN)/python
	$(BIN)/python -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install $(CONSTRAINTS) --editable .
	version=$$($(GPU_VENV)/bin/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	@touch $@
