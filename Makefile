# Everything a person or a CI machine does here is one of these targets; `make` alone lists them.
# pip reads the package index as it is set up on the machine.

PYTHON ?= python3
WORKERS ?= 2
HYPOTHESIS_PROFILE ?= ci
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One thread per test worker: more would only wait for one another. The demo's model is too small for two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
TESTS := $(ONE_THREAD) HYPOTHESIS_PROFILE=$(HYPOTHESIS_PROFILE)
PYTEST := $(TESTS) $(BIN)/python -m pytest
LOWEST := .venv-lowest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-lowest lint format wheel-test docs docs-pictures names clean test-gpu test-portable

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12  another interpreter (after 'make clean')   ARGS='-k svd'  more for pytest"

demo: $(VENV)/.made-cli ## compress the embedded GPT-2, evaluate, reload, generate, write demo_out/
	$(ONE_THREAD) $(BIN)/tensornet demo demo_out --force

test: $(VENV)/.made-dev ## run the tests, in a few minutes
	$(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(VENV)/.made-all ## all tests, with every extra: architectures, kill tests, toy benchmarks, code of pages
	$(PYTEST) -n $(WORKERS) $(ARGS)

test-portable: $(VENV)/.made-dev ## the tests of `make test` with PyTorch's kernels for any processor
	ATEN_CPU_CAPABILITY=default $(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

test-gpu: $(VENV)/.made-dev ## run the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make: PyTorch finds no CUDA device here")'
	$(PYTEST) -m gpu $(ARGS)

test-lowest: $(LOWEST)/.made ## run the tests with the lowest versions that pyproject.toml allows
	$(TESTS) $(LOWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: $(VENV)/.made-dev ## linter, formatter, types: only report
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.made-dev ## let the linter and the formatter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-test: $(VENV)/.made-dev ## build the wheel and install it away from here: core, then each extra
	$(BIN)/python tests/wheel/check_wheel.py

docs: $(VENV)/.made-docs ## build the site into build/site/; a warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-pictures: $(VENV)/.made-dev ## make the pictures that pages draw, and what notebooks print, anew
	$(ONE_THREAD) PYTHONPATH=tests $(BIN)/python tests/project/test_docs_code.py

names: $(VENV)/.made-dev ## record the public names after changing them on purpose
	PYTHONPATH=tests $(BIN)/python tests/project/test_architecture.py --update

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(LOWEST) demo_out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: set-up runs once, and again when pyproject.toml changes.

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no $(PYTHON) on this machine; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $$($(PYTHON) --version) is too old, 3.10 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.made-cli: pyproject.toml $(VENV)/.made
	@echo "Setting up $(VENV), once: the first time PyTorch is downloaded, which can take some minutes."
	$(BIN)/python -m pip install -e '.[cli]'
	@touch $@

# Direct dependencies at their lower bounds, theirs as new as they may be. pip cannot resolve so; uv can. PyTorch
# comes from the package index with what it needs for CUDA: some gigabytes. Its compiler imports setuptools.
$(LOWEST)/.made: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) on this machine" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test,interop]' 'setuptools>=70'
	@touch $@

# One environment for tests and linters, so that types are checked against the packages that are tested.
$(VENV)/.made-dev: pyproject.toml $(VENV)/.made
	@echo "Setting up $(VENV), once: the first time PyTorch is downloaded, which can take some minutes."
	$(BIN)/python -m pip install -e '.[test,interop,lint]'
	@touch $@

# Every extra that a test would otherwise be skipped without.
$(VENV)/.made-all: $(VENV)/.made-dev
	$(BIN)/python -m pip install -e '.[all,test,eval]' 'llama-cpp-py-sync==0.11739' 'onnxruntime-genai>=0.18' onnx-ir 'openvino-genai>=2026.4'
	@touch $@

# The site is built from the sources: pages of the API are read, not imported.
$(VENV)/.made-docs: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@
